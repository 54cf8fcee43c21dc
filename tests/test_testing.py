"""The contract catches saboteurs, and lets honest plug-ins pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.errors import Unsupported
from xbench.maps import channel_sum, is_constant
from xbench.masking import MaskedScores
from xbench.probe import Explanation, ImageGradient, Need, Probe
from xbench.testing import (
    LinearNetwork,
    ShareNetwork,
    check_dataset,
    check_method,
    check_metric,
    check_model,
    planted_batch,
    toy_batch,
    toy_model,
    toy_network,
    unchanged,
)
from xbench.types import Model, Passes, Sample

pytestmark = pytest.mark.usefixtures("own_names")


def gradient(probe: Probe) -> Tensor:
    return channel_sum(probe[ImageGradient()])


def check_method_of(call: Callable[[Probe], Any], **facts: Any) -> None:
    """The contract of a method that is this function."""

    class Sabotage:
        """A method."""

        needs: ClassVar[tuple[Need[Any], ...]] = (ImageGradient(),)

        def __call__(self, probe: Probe) -> Any:
            return call(probe)

    Sabotage.__qualname__ = "Sabotage"  # so that pickle finds it
    for name, value in facts.items():
        setattr(Sabotage, name, value)
    globals()["Sabotage"] = registry.method("sabotage")(Sabotage)
    check_method("sabotage")


def check_metric_of(
    call: Callable[[Explanation], Any], better: str = "higher", **facts: Any
) -> None:
    """The contract of a metric that is this function."""

    class Sabotage:
        """A metric."""

        needs: ClassVar[tuple[Need[Any], ...]] = ()

        def __call__(self, explanation: Explanation) -> Any:
            return call(explanation)

    Sabotage.__qualname__ = "Sabotage"
    for name, value in {"better": better, **facts}.items():
        setattr(Sabotage, name, value)
    globals()["Sabotage"] = registry.metric("sabotage")(Sabotage)
    check_metric("sabotage")


def test_an_honest_method_passes() -> None:
    check_method_of(gradient)


def test_a_method_that_declares_nothing_passes() -> None:
    class Bare:
        """Its cost is unknown."""

        def __call__(self, probe: Probe) -> Tensor:
            return probe.input_gradient(probe.inputs).abs().sum(1)

    Bare.__qualname__ = "Bare"
    globals()["Bare"] = registry.method("bare")(Bare)
    check_method("bare")


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda probe: gradient(probe)[:, None], r"got \(8, 1, 16, 16\)"),
        (lambda probe: gradient(probe)[:, ::2, ::2], r"got \(8, 8, 8\)"),
        (lambda probe: gradient(probe)[0], r"got \(16, 16\)"),
        (lambda probe: gradient(probe).numpy(), "got ndarray"),
    ],
)
def test_a_method_of_another_shape_is_caught(call: Callable[[Probe], Any], shown: str) -> None:
    with pytest.raises(AssertionError, match=rf"must return maps of shape .*{shown}"):
        check_method_of(call)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_method_that_is_not_finite_is_caught(value: float) -> None:
    with pytest.raises(AssertionError, match="sabotage returns maps that are not finite"):
        check_method_of(lambda probe: gradient(probe) * value)


def test_a_method_that_spreads_nan_is_caught() -> None:
    with pytest.raises(AssertionError, match="NaN in one image changes another image's map"):
        check_method_of(lambda probe: gradient(probe) + 0 * probe.inputs.sum())


def test_a_method_of_another_dtype_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"returns torch.float32, not the input's dtype"):
        check_method_of(lambda probe: gradient(probe).float())


@pytest.mark.parametrize(
    "couple",
    [
        lambda maps: maps / maps.max(),
        lambda maps: maps - maps.mean(0),
        lambda maps: maps.flip(0),
        lambda maps: maps * len(maps),
    ],
    ids=["maximum of the batch", "mean of the batch", "order", "size"],
)
def test_a_method_that_reads_an_images_neighbours_is_caught(
    couple: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(AssertionError, match="a batch of 8 differs from 8 batches of 1"):
        check_method_of(lambda probe: couple(gradient(probe)))


def test_a_method_that_draws_from_the_global_generator_is_caught() -> None:
    with pytest.raises(AssertionError, match="is not the same twice under one seed"):
        check_method_of(lambda probe: gradient(probe) + torch.rand(probe.inputs[:, 0].shape))


def test_a_method_that_seeds_the_global_generator_is_caught() -> None:
    def seeded(probe: Probe) -> Tensor:
        torch.manual_seed(0)
        noise = torch.rand(probe.inputs.shape[-2:])
        return gradient(probe) + noise

    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(AssertionError, match=r"leaves a trace in .* the global random state"),
    ):
        check_method_of(seeded)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_a_method_that_leaves_a_hook_is_caught(register: str, once: bool) -> None:
    hooked: set[nn.Module] = set()

    def leaves(probe: Probe) -> Tensor:
        layer = probe.model.net.get_submodule("5")
        if not (once and layer in hooked):
            hooked.add(layer)
            getattr(layer, register)(lambda *_: None)
        return gradient(probe)

    with pytest.raises(AssertionError, match="leaves a trace in the network"):
        check_method_of(leaves)


@pytest.mark.parametrize("once", [False, True])
def test_a_method_that_changes_weights_is_caught(once: bool) -> None:
    changed: set[nn.Module] = set()

    def changes(probe: Probe) -> Tensor:
        head = probe.model.net.get_submodule("6")
        assert isinstance(head, nn.Linear)
        maps = gradient(probe)
        if not (once and head in changed):
            changed.add(head)
            head.bias.data[0] += 1e-9  # too little to change a map
        return maps

    with pytest.raises(AssertionError, match="leaves a trace in the network"):
        check_method_of(changes)


def test_a_method_that_leaves_training_mode_on_is_caught() -> None:
    def trains(probe: Probe) -> Tensor:
        probe.model.net.train()
        return gradient(probe)

    with pytest.raises(AssertionError, match="leaves a trace in the network"):
        check_method_of(trains)


def test_a_method_that_writes_on_the_images_is_caught() -> None:
    def writes(probe: Probe) -> Tensor:
        maps = gradient(probe)
        probe.batch.images[0, 0, 0, 0] += 1e-9
        return maps

    with pytest.raises(AssertionError, match=r"is not the same twice|leaves a trace in"):
        check_method_of(writes)


@pytest.mark.parametrize("more", [1, 2])
def test_a_method_that_spends_more_than_it_declares_is_caught(more: int) -> None:
    def spends(probe: Probe) -> Tensor:
        for _ in range(more):
            probe.model.net(probe.inputs)
        return gradient(probe)

    message = rf"declares .*forward=1, backward=1.* but spends .*forward={1 + more}, backward=1"
    with pytest.raises(AssertionError, match=message):
        check_method_of(spends)


def test_a_method_that_spends_less_than_it_declares_is_caught() -> None:
    own = property(lambda self: lambda model: Passes(2, 0))
    with pytest.raises(AssertionError, match=r"declares .*forward=3.* but spends .*forward=1"):
        check_method_of(gradient, passes=own)


def test_a_method_that_ignores_the_target_is_caught_unless_it_says_so() -> None:
    def ignores(probe: Probe) -> Tensor:
        return probe.inputs.abs().sum(1)

    with pytest.raises(AssertionError, match="does not depend on the target class"):
        check_method_of(ignores, needs=())
    check_method_of(ignores, needs=(), class_agnostic=True)


def test_a_method_that_keeps_tensors_is_caught() -> None:
    kept = []

    def hoards(probe: Probe) -> Tensor:
        maps = gradient(probe)
        kept.append(maps)
        return maps

    with pytest.raises(AssertionError, match="keeps tensors alive from one call to the next"):
        check_method_of(hoards)


def test_a_method_that_meets_an_unsuitable_network_with_another_error_is_caught() -> None:
    def assumes(probe: Probe) -> Tensor:
        return gradient(probe) * probe.model.net.get_parameter("0.weight").ndim.__rfloordiv__(4)

    with pytest.raises(AssertionError, match=r"meets an unsuitable network with AttributeError"):
        check_method_of(assumes)


def test_a_method_for_transformers_is_held_to_one_and_must_refuse_other_networks() -> None:
    def attends(probe: Probe) -> Tensor:
        if not any(isinstance(m, nn.MultiheadAttention) for m in probe.model.net.modules()):
            raise Unsupported("no attention")
        return gradient(probe)

    check_method_of(attends, architecture="transformer")
    with pytest.raises(AssertionError, match="but works on a convolutional network"):
        check_method_of(gradient, architecture="transformer")


def test_a_method_without_docstring_is_caught() -> None:
    with pytest.raises(AssertionError, match="sabotage has no docstring"):
        check_method_of(gradient, __doc__=None)


# --- metrics --------------------------------------------------------------------------------------


def mass(explanation: Explanation) -> Tensor:
    """The share of the map on the planted object: high for its mask, 1/16 for random maps."""
    masks = explanation.probe.batch.masks
    assert masks is not None
    total = explanation.saliency.sum((1, 2))
    return (explanation.saliency * masks).sum((1, 2)) / total.where(total > 0, 1)


def test_an_honest_metric_passes() -> None:
    check_metric_of(mass, range=(0.0, 1.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda explanation: mass(explanation).mean(),
        lambda explanation: mass(explanation)[:, None],
        lambda explanation: mass(explanation)[:-1],
    ],
)
def test_a_metric_that_is_not_per_image_is_caught(call: Callable[[Explanation], Tensor]) -> None:
    with pytest.raises(AssertionError, match="must return one value per image"):
        check_metric_of(call)


def test_a_metric_that_returns_no_tensor_is_caught() -> None:
    with pytest.raises(AssertionError, match="must return a tensor"):
        check_metric_of(lambda explanation: mass(explanation).tolist())


def test_a_metric_that_leaves_its_range_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"leaves its range 0.0 to 1.0"):
        check_metric_of(lambda explanation: 100 * mass(explanation), range=(0.0, 1.0))


def test_a_metric_that_declares_the_wrong_direction_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"does not beat random maps \(lower is better\)"):
        check_metric_of(mass, better="lower")


def test_a_metric_that_declares_no_direction_is_caught() -> None:
    with pytest.raises(AssertionError, match="must declare better: higher or lower, or neither"):
        check_metric_of(mass, better="up")


def test_a_fact_about_maps_need_not_beat_random_maps() -> None:
    check_metric_of(lambda explanation: -mass(explanation), better="neither")


@pytest.mark.parametrize(
    "couple",
    [lambda found: found / found.max(), lambda found: found - found.mean()],
    ids=["maximum of the batch", "mean of the batch"],
)
def test_a_metric_that_couples_images_is_caught(couple: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="a batch of 8 differs from 8 batches of 1"):
        check_metric_of(lambda explanation: couple(mass(explanation)))


def test_a_metric_that_draws_from_the_global_generator_is_caught() -> None:
    with pytest.raises(AssertionError, match="is not the same twice"):
        check_metric_of(lambda explanation: mass(explanation) + 1e-9 * torch.rand(1))


def test_a_metric_that_spends_more_than_it_declares_is_caught() -> None:
    def spends(explanation: Explanation) -> Tensor:
        explanation.probe.model.net(explanation.probe.inputs)
        return mass(explanation)

    with pytest.raises(AssertionError, match=r"declares .*forward=1.* but spends .*forward=2"):
        check_metric_of(spends)


def test_a_metric_that_does_not_declare_a_shared_need_is_caught() -> None:
    def reads(explanation: Explanation) -> Tensor:
        return explanation[MaskedScores("black", "magnitude")][:, 0]

    with pytest.raises(AssertionError, match=r"declares .*forward=1.* but spends .*forward=2"):
        check_metric_of(reads)
    check_metric_of(reads, needs=(MaskedScores("black", "magnitude"),))


def test_a_metric_that_is_infinite_on_a_constant_map_is_caught() -> None:
    def divides(explanation: Explanation) -> Tensor:
        return mass(explanation) / explanation.saliency.flatten(1).std(1).where(
            ~is_constant(explanation.saliency), 0
        )

    with pytest.raises(AssertionError, match="of a constant map is infinite"):
        check_metric_of(divides)


def test_a_metric_that_keeps_tensors_is_caught() -> None:
    kept = []

    def hoards(explanation: Explanation) -> Tensor:
        kept.append(explanation.saliency * 1)
        return mass(explanation)

    with pytest.raises(AssertionError, match="keeps tensors alive from one call to the next"):
        check_metric_of(hoards)


def test_a_metric_that_runs_the_method_again_is_given_one() -> None:
    seen = []

    def watches(explanation: Explanation) -> Tensor:
        seen.append(explanation.method.name)
        return mass(explanation)

    check_metric_of(watches)
    assert set(seen) == {"gradient"}


def test_a_metric_that_leaves_a_hook_is_caught() -> None:
    def leaves(explanation: Explanation) -> Tensor:
        explanation.probe.model.net.register_forward_hook(lambda *_: None)
        return mass(explanation)

    with pytest.raises(AssertionError, match="leaves a trace in the network"):
        check_metric_of(leaves)


# --- models and data sets -------------------------------------------------------------------------


@dataclass
class Few:
    """A source with a flaw."""

    flaw: str = ""
    classes: tuple[str, ...] = ("a", "b")
    revision: str = "1"
    size: tuple[int, int] = (8, 8)
    has_masks: bool = False

    @property
    def ids(self) -> list[str]:
        return ["0", "0"] if self.flaw == "id" else ["0", "1"]

    def key(self, index: int) -> str:
        return "0" if self.flaw == "key" else str(index)

    def load(self, indices: Any) -> list[Any]:
        side = 9 if self.flaw == "size" else 8
        image = torch.rand(3, side, side) * (2 if self.flaw == "range" else 1)
        if self.flaw == "dtype":
            image = image.double()
        mask = torch.ones(8, 8) if self.flaw == "mask" else None
        return [Sample(image, 5 if self.flaw == "label" else 1, mask) for _ in indices]


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("id", "has an id twice"),
        ("key", "has a key twice"),
        ("size", r"an image is torch.Size\(\[3, 9, 9\]\)"),
        ("range", r"pixels must lie in \[0, 1\]"),
        ("dtype", "images must be float32"),
        ("label", "label 5 is out of range"),
        ("mask", "has_masks does not hold"),
        ("", ""),
    ],
)
def test_a_flawed_data_set_is_caught(flaw: str, message: str) -> None:
    class Data:
        """A data set."""

        def open(self, data: Any) -> Few:
            return Few(flaw)

    Data.__qualname__ = "Data"
    globals()["Data"] = registry.dataset("few")(Data)
    if not flaw:
        check_dataset("few")
        return
    with pytest.raises(AssertionError, match=message):
        check_dataset("few")


def test_a_model_that_returns_no_logits_is_caught() -> None:
    from xbench.types import Network

    class Flawed:
        """A model."""

        def describe(self, data: Any) -> Network:
            build: Any = lambda: nn.Conv2d(3, 4, 3)  # noqa: E731
            return Network(build, None, (0.0,) * 3, (1.0,) * 3, {})

    Flawed.__qualname__ = "Flawed"
    globals()["Flawed"] = registry.model("flawed")(Flawed)
    with pytest.raises(AssertionError, match="the hash changes"):  # fresh weights, each time others
        check_model("flawed")


# --- the toys themselves --------------------------------------------------------------------------


def test_toys_are_the_same_every_time_and_leave_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    one, two = toy_network(seed=3).state_dict(), toy_network(seed=3).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(toy_batch(3).images, toy_batch(8).images[:3])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_linear_network_is_its_matrix() -> None:
    weight = torch.arange(24.0).view(2, 12)
    images = torch.rand(3, 3, 2, 2)
    assert torch.equal(LinearNetwork(weight)(images), images.flatten(1) @ weight.T)


def test_a_share_network_has_the_shown_share_as_probability() -> None:
    share = torch.tensor([[0.4, 0.3], [0.2, 0.05]], dtype=torch.float64)
    images = torch.ones(1, 3, 2, 2).double()
    images[0, :, 0, 0] = 0
    found = ShareNetwork(share)(images).softmax(1)
    torch.testing.assert_close(found, torch.tensor([[0.55, 0.45]], dtype=torch.float64))


def test_the_planted_object_is_all_the_evidence() -> None:
    model, batch = planted_batch()
    assert batch.masks is not None
    masks = batch.masks[:, None]
    whole, kept, lost = (
        model.net(images).softmax(1)[:, 0]
        for images in (batch.images, batch.images * masks, batch.images * (1 - masks))
    )
    assert (kept > whole).all()
    assert (lost < whole).all()


def test_unchanged_sees_every_kind_of_trace() -> None:
    def change_buffer(net: nn.Module) -> None:
        net.get_submodule("0").register_buffer("more", torch.zeros(1))

    traces: list[Callable[[nn.Module], Any]] = [
        lambda net: net.train(),
        lambda net: net.get_parameter("0.weight").requires_grad_(True),
        lambda net: net.get_parameter("0.weight").add_(1e-12),
        lambda net: net.register_forward_pre_hook(lambda *_: None),
        lambda net: torch.rand(1),
        change_buffer,
    ]
    for trace in traces:
        model = toy_model()
        with (
            pytest.raises(AssertionError, match="it leaves a trace in the network"),
            unchanged(model, toy_batch(1), "it"),
        ):
            trace(model.net)


def test_unsupported_is_no_failure_of_the_contract() -> None:
    def refuses(probe: Probe) -> Tensor:
        if probe.model.name == "flat":
            raise Unsupported("no convolution")
        return gradient(probe)

    check_method_of(refuses)


def test_a_model_is_named_in_tables_as_it_was_made() -> None:
    assert Model("x", nn.Identity()).layer("layer4") == "layer4"
    assert Model("x", nn.Identity(), layers={"last_conv": "layer4"}).layer("last_conv") == "layer4"
