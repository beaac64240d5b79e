"""Hidden layers are found by the dataflow, whatever they are called; what a graph cannot hold is refused or flagged, never guessed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from knife_jax.config import AgentConfig, Config
from knife_jax.networks import agents, mixers
from knife_jax.networks.neurons import Dense
from knife_jax.plasticity.discover import discover
from knife_jax.plasticity.graph import flat
from knife_jax.plasticity.knife import knife
from knife_jax.plasticity.method import Trees

INPUTS = jnp.linspace(-1.0, 1.0, 30).reshape(6, 5)


class Net(nn.Module):
    """A model whose forward pass is given as a function."""

    forward: Any

    @nn.compact
    def __call__(self, *inputs):
        """Whatever the function does."""
        return self.forward(*inputs)


def between(function):
    """Dense `made`, a function, Dense `read`."""
    return Net(lambda x: nn.Dense(3, name="read")(function(nn.Dense(8, name="made")(x))))


def found(forward, *inputs):
    """The layers of a forward pass by name, and the graph."""
    graph = discover(Net(forward), *(inputs or (INPUTS,)))
    return {layer.name: layer for layer in graph.layers}, graph


def modules(paths):
    """The modules that kernels belong to."""
    return ["/".join(path[:-1]) for path in paths]


def test_names_and_order_of_creation_play_no_part():
    """`Dense_0` is the output here, and the last to be created is the first to be used."""

    def forward(x):
        output, second, first = nn.Dense(3), Dense(7), nn.Dense(8, use_bias=False)
        return output(nn.tanh(second(nn.relu(first(x)))))

    _, graph = found(forward)
    first, second = graph.layers
    assert (first.name, first.size, first.biases, first.activation) == ("Dense_2", 8, (), nn.relu)
    assert (second.name, second.size, second.biases, second.activation) == ("Dense_1", 7, (("Dense_1", "bias"),), nn.tanh)
    assert first.outgoing == (("Dense_1", "kernel"),) and second.outgoing == (("Dense_0", "kernel"),)
    assert second.outgoing_biases == (("Dense_0", "bias"),)
    assert graph.heads == (("Dense_0",),) and not any(layer.normalised or layer.leaks for layer in graph.layers)
    assert flat(graph.draw(jax.random.key(0))).keys() == graph.shapes.keys()


def test_modules_of_setup_and_nested_ones():
    """Names are the modules' paths, and a layer's network is their first part."""

    class Torso(nn.Module):
        def setup(self):
            self.last, self.early = nn.Dense(6), nn.Dense(8)

        def __call__(self, x):
            return nn.relu(self.last(nn.relu(self.early(x))))

    class Model(nn.Module):
        def setup(self):
            self.head, self.torso = nn.Dense(3), Torso()

        def __call__(self, x):
            return self.head(self.torso(x))

    graph = discover(Model(), INPUTS)
    assert [(layer.name, layer.network, modules(layer.outgoing)) for layer in graph.layers] == [
        ("torso/early", "torso", ["torso/last"]),
        ("torso/last", "torso", ["head"]),
    ]


def test_several_readers_of_one_layer():
    """Two heads, and the three gates of a GRU."""

    def forward(carry, x):
        features = nn.relu(nn.Dense(8, name="torso")(x))
        carry, memory = nn.GRUCell(8, name="gru")(carry, nn.relu(nn.Dense(7, name="before")(features)))
        features = nn.relu(nn.Dense(6, name="after")(memory))
        return carry, nn.Dense(3, name="policy")(features), nn.Dense(1, use_bias=False, name="value")(features)

    layers, graph = found(forward, jnp.zeros((6, 8)), INPUTS)
    assert {name: modules(layer.outgoing) for name, layer in layers.items()} == {
        "torso": ["before"],
        "before": ["gru/ir", "gru/iz", "gru/in"],
        "after": ["policy", "value"],
    }
    assert layers["after"].outgoing_biases == (("policy", "bias"), None)
    assert not any(layer.leaks or layer.normalised for layer in graph.layers)
    with pytest.raises(ValueError, match="gru/ir: no Dense module reads its units alone and in place"):
        graph.select("gru/ir")


@pytest.mark.parametrize("activation", [nn.relu, nn.tanh, nn.gelu, nn.silu, nn.elu, nn.leaky_relu, nn.softplus, nn.selu, nn.sigmoid])
def test_activations_are_recognised_by_their_values(activation):
    """Also when they are written out, or computed in half precision."""
    layer = discover(between(activation), INPUTS).layers[0]
    assert layer.activation is activation
    half = discover(between(lambda x: activation(x.astype(jnp.bfloat16)).astype(jnp.float32)), INPUTS).layers[0]
    assert half.activation is activation


def test_the_exact_gelu_is_not_the_usual_one():
    """Flax's default is an approximation; written by hand, relu is relu."""
    exact = discover(between(lambda x: nn.gelu(x, approximate=False)), INPUTS).layers[0].activation
    np.testing.assert_allclose(exact(INPUTS), nn.gelu(INPUTS, approximate=False), atol=1e-6)
    assert discover(between(lambda x: jnp.where(x > 0, x, 0.0)), INPUTS).layers[0].activation is nn.relu


def test_an_unknown_activation_is_asked_for():
    """The option is named, taken, and held to what the model computes."""

    def steep(values):
        return nn.leaky_relu(values, 0.3)

    with pytest.raises(ValueError, match=r"activation of made is none of relu, .*activations=\{'made': function\}"):
        discover(between(steep), INPUTS)
    assert discover(between(steep), INPUTS, activations={"made": steep}).layers[0].activation is steep
    with pytest.raises(ValueError, match="activations: made: relu is not what the model computes"):
        discover(between(steep), INPUTS, activations={"made": nn.relu})
    with pytest.raises(ValueError, match="no hidden layer 'mad' in Net: did you mean 'made'"):
        discover(between(nn.relu), INPUTS, activations={"mad": nn.relu})


def test_linear_pairs_only_count_when_asked():
    """A product of two kernels has no hidden units, unless the user says so."""
    with pytest.raises(ValueError, match=r"no hidden layer in Net: made: nothing but a linear map .*read: no Dense module reads it"):
        discover(between(lambda x: x), INPUTS)
    graph = discover(between(lambda x: x), INPUTS, activations={"made": lambda x: x})
    assert graph.layers[0].name == "made"


NORMALISED = {
    "before the activation": lambda x: nn.relu(nn.LayerNorm()(x)),
    "after the activation": lambda x: nn.LayerNorm(use_scale=False, use_bias=False)(nn.relu(x)),
    "root mean square": lambda x: nn.RMSNorm()(nn.relu(x)),
    "in groups": lambda x: nn.relu(nn.GroupNorm(2)(x)),
    "over the batch": lambda x: nn.relu(nn.BatchNorm(use_running_average=False)(x)),
    "by running statistics": lambda x: nn.relu(nn.BatchNorm(use_running_average=True)(x)),
    "softmax": nn.softmax,
    "a learned slope": lambda x: nn.PReLU()(x),
    "no gradient": lambda x: nn.relu(jax.lax.stop_gradient(x)),
}


@pytest.mark.parametrize("function", NORMALISED.values(), ids=NORMALISED)
def test_a_normalised_layer_is_found_and_refused_by_name(function):
    """Others may treat it, composites may not; without another layer nothing is left."""
    graph = discover(between(function), INPUTS)
    assert [(layer.name, layer.normalised, layer.leaks) for layer in graph.layers] == [("made", True, False)]
    with pytest.raises(ValueError, match="no composites on made: a normalisation"):
        knife(graph, layers="made")
    with pytest.raises(ValueError, match="none of all can carry composites"):
        knife(graph)
    with pytest.raises(ValueError, match="layer made: its activation is not known"):
        graph.layers[0].activation(INPUTS)


def in_a_loop(x):
    """Hidden states of a GRU that takes the first axis as time."""
    states: Any = nn.RNN(nn.GRUCell(4), time_major=True)(x[:, None])
    return states


LEAKS = {
    "residual": lambda h, read: read(h) + h,
    "concatenated": lambda h, read: jnp.concatenate([read(h), h], axis=-1),
    "returned": lambda h, read: (read(h), h),
    "pre-activation normalised elsewhere": lambda h, read: read(h) + nn.LayerNorm()(h),
    "reshaped": lambda h, read: read(h).sum() + h.reshape(-1).sum(),
    "transposed for another reader": lambda h, read: read(h).sum() + nn.Dense(4)(h.T).sum(),
    "read by a convolution": lambda h, read: read(h) + nn.Conv(8, (1,))(h),
    "read in a loop": lambda h, read: read(h).sum() + in_a_loop(h).sum(),
    "another activation for another reader": lambda h, read: read(h) + nn.Dense(8)(nn.tanh(h)),
    "read in company": lambda h, read: nn.Dense(2)(h + read(h)),
}


@pytest.mark.parametrize("rest", LEAKS.values(), ids=LEAKS)
def test_units_that_something_else_reads_leak(rest):
    """The reader that is known stays in the graph; KNIFE refuses the layer."""
    layers, graph = found(lambda x: rest(nn.relu(nn.Dense(8, name="made")(x)), nn.Dense(8, name="read")))
    layer = layers["made"]
    assert layer.leaks and not layer.normalised and ("read", "kernel") in layer.outgoing
    with pytest.raises(ValueError, match="no composites on made: its units are read by more"):
        knife(graph, layers="made")


def lost():
    """A module of which nothing can be made in the tests below."""
    return nn.Dense(5, name="lost")


def two_inputs_for_one_reader(x):
    """Row i of the reader's kernel is unit i of the layer, and input i of the model."""
    read = nn.Dense(2)
    return read(nn.relu(lost()(x))) + read(x)


def called_again_before_it_is_read(x):
    """Of two calls, only the later one's frozen units would be at hand."""
    module, read = lost(), nn.Dense(2)
    first, second = nn.relu(module(x)), nn.relu(module(2 * x))
    return read(first), read(second)


def used_as_a_number(x):
    """A penalty on the kernel itself."""
    module = lost()
    features = nn.relu(module(x))
    return nn.Dense(2)(features), sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(module.variables))


def over_a_mapped_axis(x):
    """The module is called inside `nn.vmap`."""
    mapped = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
    return nn.Dense(2)(nn.relu(mapped(5, name="lost")(x)))


REFUSED = {
    "a sum": (lambda x: nn.Dense(2)(x + nn.relu(lost()(x))), "something is added"),
    "dropout": (lambda x: nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(nn.relu(lost()(x)))), r"multiplied \(dropout too\)"),
    "a gate": (lambda x: nn.Dense(2)(nn.sigmoid(nn.Dense(5)(x)) * nn.relu(lost()(x))), "multiplied"),
    "reshaped": (lambda x: nn.Dense(2)(nn.relu(lost()(x)).reshape(-1)), "axes are moved"),
    "a loop": (lambda x: in_a_loop(nn.relu(lost()(x))), "no Dense module reads it"),
    "two inputs for one reader": (two_inputs_for_one_reader, "their reader also reads something else"),
    "called again": (called_again_before_it_is_read, "it is called again before they are read"),
    "used as a number": (used_as_a_number, "its parameters are also used outside of its own calls"),
    "mapped": (over_a_mapped_axis, "called inside a loop or a transformation"),
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_graph_can_hold_is_refused_with_the_reason(forward, reason):
    """Such a module is in no layer; with no other layer, there is no graph."""
    with pytest.raises(ValueError, match=f"no hidden layer in Net: .*lost: .*{reason}"):
        found(forward)


def test_a_model_without_dense_modules_has_no_graph():
    """And the message says so."""
    with pytest.raises(ValueError, match="no hidden layer in Conv: it calls no Dense module"):
        discover(nn.Conv(2, (1,)), INPUTS)


def test_further_arguments_reach_the_model():
    """As `model.init` and `model.apply` take them; plain Python values stay what they are."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, wide, train):
            x = nn.relu(nn.Dense(8 if wide else 4)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))

    assert discover(Model(), INPUTS, True, train=False).layers[0].size == 8


@pytest.mark.parametrize("mixer", ["qmix", "qplex"])
def test_the_librarys_own_networks_are_found_as_they_declare_themselves(mixer):
    """Agents with and without memory, hypernetworks, and QPLEX's stacked kernels; of a GRU's own units only the declaration knows."""
    for recurrent in (False, True):
        config = AgentConfig(recurrent=recurrent)
        declared = [layer for layer in agents.neuron_layers(config) if layer.kind == "dense"]
        network, memory = agents.AgentNetwork(4, config), agents.initial_hidden(config, (2, 3))
        assert_same(discover(network, jnp.zeros((6, 2, 3, 5)), jnp.zeros((6, 2), bool), memory), declared)
    config = Config.from_dict({"learner": {"mixer": mixer}})
    inputs = mixers.MixerInputs(jnp.zeros((7, 3)), jnp.zeros((7, 3)), jnp.zeros((7, 3, 4)), jnp.zeros((7, 9)))
    assert_same(discover(mixers.make_mixer(config), inputs), list(mixers.neuron_layers(config)))


def assert_same(graph, declared):
    """Equal but for the network's name in front and the order of layers that do not depend on each other."""
    assert {layer.name for layer in graph.layers} == {layer.name.split("/", 1)[1] for layer in declared}
    for expected in declared:
        layer = next(layer for layer in graph.layers if expected.name.endswith(f"/{layer.name}"))
        bare = {name: tuple(path[1:] for path in getattr(expected, name)) for name in ("incoming", "biases", "outgoing", "outgoing_biases")}
        assert layer == expected._replace(name=layer.name, **bare)


class Tangled(nn.Module):
    """A user's model: a rematerialised block, a residual stream, a shared module, two activations, two heads."""

    @nn.compact
    def __call__(self, x):
        """Values and a policy."""
        policy, values, shared = nn.Dense(4), Dense(3), nn.Dense(10)
        stream = x + nn.remat(Block)()(x)
        first = nn.tanh(shared(stream))
        reads = values(first), policy(first)
        second = nn.tanh(shared(-stream))
        return reads[0] - values(second), reads[1] - policy(second)


class Block(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        """As wide as its input."""
        return nn.Dense(5)(nn.silu(nn.Dense(6)(x)))


PLAIN = nn.Sequential([nn.Dense(16, use_bias=False), nn.relu, nn.Dense(16), nn.relu, nn.Dense(3), lambda values: (values,)])


@pytest.mark.parametrize(("model", "sizes", "rounding"), [(PLAIN, [16, 16], 1e-6), (Tangled(), [6, 10], 4e-6)], ids=["plain", "tangled"])
def test_knife_preserves_what_a_discovered_model_computes(model, sizes, rounding, key):
    """Over repeated interventions on all layers, with training in between; the tangled model's own rounding is larger."""
    inputs = jax.random.normal(key, (16, 5))
    graph = discover(model, inputs)
    assert sorted(layer.size for layer in graph.layers) == sizes
    method = knife(graph, threshold=100.0, reserve=1.0, max_fraction=0.4, dead_units=False)
    tx, apply_fn = method.wrap_optimizer(optax.adam(1e-2)), method.lift(model.apply)
    variables = method.allocate(dict(model.init(key, inputs)))
    trees, state = Trees(variables, None, tx.init(variables["params"])), method.init(variables)

    @jax.jit
    def train(trees, state):
        def loss(params, taps):
            outputs = apply_fn({**trees.variables, "params": params, "taps": taps}, inputs)
            return sum(jnp.square(values - 0.3).mean() for values in outputs)

        grads, taps = jax.grad(loss, (0, 1))(trees.variables["params"], method.taps(state))
        updates, opt_state = tx.update(grads, trees.opt_state, trees.variables["params"])
        params = optax.apply_updates(trees.variables["params"], updates)
        return Trees({**trees.variables, "params": params}, None, opt_state), method.observe(state, trees.variables, grads, taps)

    apply, intervene = jax.jit(apply_fn), jax.jit(lambda key, state, trees: method.apply(key, state, trees, tx))
    for round_key in jax.random.split(key, 3):
        for _ in range(3):
            trees, state = train(trees, state)
        before = apply(trees.variables, inputs)
        state, trees, report = intervene(round_key, state, trees)
        assert sum(float(value) for name, value in report.items() if name.endswith("/treated")) > 0
        for was, now in zip(before, apply(trees.variables, inputs), strict=True):
            assert jnp.abs(now - was).max() <= rounding * jnp.abs(was).max()


def test_taps_watch_a_discovered_model(key):
    """The mean |h| of every layer, gathered through the user's own modules, is that of the activations themselves."""
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(7), nn.tanh, nn.Dense(2)])
    graph = discover(model, INPUTS)
    variables = model.init(key, INPUTS)
    taps = {layer.name: {"absolute": jnp.zeros(layer.size), "count": jnp.zeros(1)} for layer in graph.layers}
    apply_fn = knife(graph).lift(model.apply)
    measured = jax.grad(lambda taps: apply_fn({**variables, "taps": taps}, INPUTS).sum())(taps)
    captured: Any = model.apply(variables, INPUTS, capture_intermediates=True)[1]
    for layer in graph.layers:
        activations = layer.activation(captured["intermediates"][layer.name]["__call__"][0])
        np.testing.assert_allclose(measured[layer.name]["absolute"], jnp.abs(activations).sum(0), rtol=1e-5)
        assert measured[layer.name]["count"] == len(INPUTS)
