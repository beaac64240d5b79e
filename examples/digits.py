"""Cures for plasticity loss in a training loop of your own, on a Flax network of your own.

A small network memorises the 8 x 8 digits of scikit-learn under random labels. Every few epochs the labels are shuffled anew, and a cure
may intervene. The task never gets harder: a network that keeps its plasticity is as good on the last labels as on the first. In the
control, `fixed`, the first labels stay. After figure 3 of Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023.

    python examples/digits.py --seeds 8 --methods none redo knife
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from flax import linen as nn
from scipy import stats

from knife_jax import plasticity

Curves = dict[str, np.ndarray]

CONTROL = "fixed"
CURES: dict[str, Callable[[plasticity.Graph, int], plasticity.Method]] = {
    CONTROL: lambda graph, tasks: plasticity.none(),
    "none": lambda graph, tasks: plasticity.none(),
    "redo": lambda graph, tasks: plasticity.redo(graph),
    "knife": lambda graph, tasks: plasticity.knife(graph, interventions=tasks, when_full="skip"),
    "random_neurons": lambda graph, tasks: plasticity.random_neurons(graph, interventions=tasks, when_full="skip"),
    "reset": lambda graph, tasks: plasticity.reset(graph, "all"),
}
COLOURS = {CONTROL: "0.5", "none": "#D55E00", "redo": "#0072B2", "knife": "#009E73", "random_neurons": "#CC79A7", "reset": "#E69F00"}

LABELS = {CONTROL: "fixed labels", "none": "no cure", "random_neurons": "random neurons", "reset": "reset everything"}


@dataclass(frozen=True)
class Settings:
    """Memorises digits whose labels are shuffled again and again."""

    methods: tuple[Literal["none", "redo", "knife", "random_neurons", "reset"], ...] = ("none", "redo", "knife", "random_neurons", "reset")
    """Cures to compare. `random_neurons` is KNIFE on as many units chosen by chance, `reset` a fresh network for every labelling."""
    seeds: int = 8
    tasks: int = 25
    """How many labellings are learned, one after the other."""
    epochs_per_task: int = 20
    images: int = 256
    width: int = 64
    """Units in each of the two hidden layers."""
    batch_size: int = 16
    learning_rate: float = 3e-3
    out: Path = Path("digits.png")


class MLP(nn.Module):
    """Your network. It knows nothing of any cure."""

    width: int

    @nn.compact
    def __call__(self, images):
        """Logits of the ten digits."""
        for _ in range(2):
            images = nn.relu(nn.Dense(self.width)(images))
        return nn.Dense(10)(images)


def make_train_step(apply_fn: Callable[..., Any], tx: optax.GradientTransformation, method: plasticity.Method) -> Callable[..., Any]:
    """Your training step; `method.taps`, `method.observe` and `method.penalty` are all that a cure adds to it."""

    def train_step(carry, batch):
        variables, opt_state, state = carry
        images, labels = batch

        def loss(params, taps):
            logits = apply_fn({**variables, "params": params, "taps": taps}, images)
            error = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return error + method.penalty(params, state)

        grads, taps = jax.grad(loss, argnums=(0, 1))(variables["params"], method.taps(state))
        state = method.observe(state, variables, grads, taps)
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        variables = {**variables, "params": optax.apply_updates(variables["params"], updates)}
        return (variables, opt_state, state), None

    return train_step


def make_run(name: str, settings: Settings, images: jax.Array, labels: jax.Array) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The whole life of one network with one cure, as a pure function of a key; what comes out are arrays over tasks."""
    model = MLP(settings.width)
    graph = plasticity.discover(model, images)
    method = CURES[name](graph, settings.tasks)
    apply_fn, tx = method.lift(model.apply), method.wrap_optimizer(optax.adam(settings.learning_rate))
    train_step = make_train_step(apply_fn, tx, method)

    def train_task(carry, keys):
        key_labels, key_batches, key_cure = keys
        shuffled = jax.random.permutation(key_labels, labels)
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(labels)))(jax.random.split(key_batches, settings.epochs_per_task))
        batches = orders[:, : len(labels) // settings.batch_size * settings.batch_size].reshape(-1, settings.batch_size)
        (variables, opt_state, state), _ = jax.lax.scan(train_step, carry, (images[batches], shuffled[batches]))
        accuracy = (apply_fn(variables, images).argmax(-1) == shuffled).mean()
        dormant = dormant_share(model, graph, variables, images)
        trees = plasticity.Trees(variables, opt_state=opt_state)
        state, trees, report = method.apply(key_cure, state, trees, tx)
        no_slot = sum((count for measure, count in report.items() if measure.endswith("/reserve_full")), jnp.zeros(()))
        return (trees.variables, trees.opt_state, state), {"accuracy": accuracy, "dormant": dormant, "no_slot": no_slot}

    def run(key):
        key_init, *keys = jax.random.split(key, 4)
        variables = method.allocate(dict(model.init(key_init, images)))
        key_labels, key_batches, key_cure = (jax.random.split(key, settings.tasks) for key in keys)
        if name == CONTROL:
            key_labels = key_labels[jnp.zeros(settings.tasks, int)]
        carry = variables, tx.init(variables["params"]), method.init(variables)
        return jax.lax.scan(train_task, carry, (key_labels, key_batches, key_cure))[1]

    return run


def dormant_share(model: nn.Module, graph: plasticity.Graph, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    """The share of hidden units whose mean |h| is at most a tenth of their layer's; the gradient of a tap is the sum of |h|."""
    apply_fn = plasticity.redo(graph).lift(model.apply)
    taps = {layer.name: {"absolute": jnp.zeros(layer.size)} for layer in graph.layers}
    sums = jax.grad(lambda taps: apply_fn({**variables, "taps": taps}, images).sum())(taps)
    return jnp.concatenate([layer["absolute"] <= 0.1 * layer["absolute"].mean() for layer in sums.values()]).mean()


def load_digits(settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Images `[N, 64]` in [0, 1] and their digits."""
    try:
        from sklearn import datasets
    except ImportError:
        raise SystemExit("this example needs scikit-learn: pip install 'knife-jax[examples]'") from None
    images, labels = datasets.load_digits(return_X_y=True)
    return jnp.asarray(images[: settings.images] / 16.0, jnp.float32), jnp.asarray(labels[: settings.images])


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, the seeds, and half the width of its 95 % interval (Student's t); none for a single seed."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0) if len(values) > 1 else np.nan * values[0]
    return values.mean(axis=0), half


def late(curve: np.ndarray) -> np.ndarray:
    """Of every seed, the mean over the last quarter of the tasks."""
    return curve[:, -max(1, curve.shape[1] // 4) :].mean(axis=1)


def percent(values: np.ndarray) -> str:
    """Mean and interval of shares."""
    mean, half = interval(100 * values)
    return f"{mean:3.0f} %" if np.isnan(half) else f"{mean:3.0f} ± {half:2.0f} %"


def compare(values: np.ndarray, others: np.ndarray, better: str, worse: str) -> str:
    """The mean difference of the same seeds, and what its interval allows to say."""
    mean, half = interval(100 * (values - others))
    if np.isnan(half):
        return f"{mean:+3.0f} points: one seed, no interval"
    verdict = better if mean - half > 0 else worse if mean + half < 0 else "no difference that these seeds could show"
    return f"{mean:+3.0f} points [{mean - half:+3.0f}, {mean + half:+3.0f}]: {verdict}"


def tell(curves: dict[str, Curves], seconds: dict[str, float]) -> None:
    """Prints a table, and sentences that follow from its numbers alone."""
    print(f"\n{'':16}{'first task':>12}{'last quarter':>15}{'dormant units':>16}{'without slot':>15}{'seconds':>10}")
    for name, curve in curves.items():
        first, last, dormant = (percent(values) for values in (curve["accuracy"][:, 0], late(curve["accuracy"]), late(curve["dormant"])))
        print(f"{name:16}{first:>12}{last:>15}{dormant:>16}{late(curve['no_slot']).mean():>15.1f}{seconds[name]:>10.0f}")
    print("\nAccuracy in the last quarter of the tasks, seed by seed, mean and 95 % interval:")
    accuracy = {name: late(curve["accuracy"]) for name, curve in curves.items()}
    if "none" in curves:
        said = compare(accuracy["none"], curves["none"]["accuracy"][:, 0], "nothing to cure", "plasticity was lost")
        print(f"  {'none against its first task':32}{said}")
    pairs = [(name, "none") for name in curves if name not in (CONTROL, "none")] + [("knife", "random_neurons"), ("knife", "redo")]
    for name, other in pairs:
        if name in curves and other in curves:
            print(f"  {f'{name} against {other}':32}{compare(accuracy[name], accuracy[other], f'{name} is better', f'{other} is better')}")


def plot(curves: dict[str, Curves], settings: Settings) -> None:
    """Draws accuracy and dormant units over tasks, mean and 95 % interval over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    tasks = np.arange(1, settings.tasks + 1)
    for axis, measure, title in zip(
        axes, ("accuracy", "dormant"), ("accuracy on the training labels", "dormant hidden units"), strict=True
    ):
        for name, curve in curves.items():
            mean, half = interval(curve[measure])
            axis.plot(tasks, mean, "--" if name == CONTROL else "-", color=COLOURS[name], label=LABELS.get(name, name))
            axis.fill_between(tasks, mean - half, mean + half, color=COLOURS[name], alpha=0.15, linewidth=0)
        axis.set(title=f"{title}, end of each task", xlabel="task", ylim=(0, 1.02), xlim=(1, settings.tasks))
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False)
    figure.savefig(settings.out, dpi=150)
    print(f"\nplot: {settings.out}")


def main(settings: Settings) -> None:
    """Runs the control and every cure on the same seeds."""
    images, labels = load_digits(settings)
    keys = jax.random.split(jax.random.key(0), settings.seeds)
    curves, seconds = {}, {}
    for name in (CONTROL, *settings.methods):
        start = perf_counter()
        curves[name] = jax.tree.map(np.asarray, jax.jit(jax.vmap(make_run(name, settings, images, labels)))(keys))
        seconds[name] = perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    tell(curves, seconds)
    plot(curves, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
