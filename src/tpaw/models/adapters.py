"""Adapters in memory: one base, and one adapter at a time on top of it.

The base is loaded once. PEFT puts the layers of an adapter around those of the base and takes them
off again, so the base's own tensors stay where they are and never change. The weights of an
adapter are fp32, whatever the base is: an update of 1e-6 would vanish in a bf16 weight.

A player's adapter is ΔW = s·BA for each target layer, with A of shape (r, in), B of shape (out, r)
and s = alpha / r.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw.config.schema import AdapterConfig
from tpaw.errors import InputError
from tpaw.models.adapter_files import (
    ADAPTER_WEIGHTS,
    LoraWeights,
    adapter_shapes,
    read_lora,
)
from tpaw.models.fingerprint import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

    from tpaw.team import Base

# PEFT's name of the adapter. Its files are in the folder itself.
_NAME = "default"


def require_peft() -> None:
    """Refuse adapters without PEFT.

    Raises:
        InputError: saying what to install.
    """
    try:
        from transformers.utils.versions import require_version

        require_version("peft>=0.18")
    except ImportError as error:
        raise InputError(f"model: adapters need PEFT: pip install 'tpaw[lora]' ({error})") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings that PEFT causes when it reads names that transformers has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


class AdaptedBase:
    """A base in memory that wears one adapter at a time.

    Args:
        base: the loaded base, in evaluation mode, with dropout disabled.

    Attributes:
        base: the same object. Its forward is that of the player whose adapter it wears.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._worn: PeftModel | None = None

    def put_on(self, folder: str | None) -> PreTrainedModel:
        """Make the base a player, for generation and scoring.

        Args:
            folder: of the player's adapter; None for the base alone.

        Returns:
            `base`, in evaluation mode.
        """
        self.take_off()
        if folder is not None:
            self._worn = _load(self.base, folder, is_trainable=False)
        self.base.eval()
        return self.base

    def policy(self, folder: str | None, config: AdapterConfig, seed: int) -> PeftModel:
        """The policy of an iteration, which starts as a player. Only its adapter is trained.

        Args:
            folder: of the player's adapter; None for the base alone.
            config: the section `model.adapter`.
            seed: of the matrix A of a new adapter. B starts as 0, so that ΔW = 0.
        """
        self.take_off()
        if folder is None or config.each_iteration == "fresh":
            self._worn = _stack(self.base, folder, config, seed)
        else:
            self._worn = _load(self.base, folder, is_trainable=True)
        return self._worn

    def take_off(self) -> None:
        """Take the adapter off, and whatever training has switched on in the base."""
        if self._worn is None:
            return
        self._worn.unload()
        self._worn = None
        if self.base.supports_gradient_checkpointing:
            self.base.activation_checkpointing_disable()


def merged(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The base with an adapter added to its weights, in the base's dtype."""
    model: PreTrainedModel = _load(base, folder, is_trainable=False).merge_and_unload()
    return model.requires_grad_(True)


def wear(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The base as the player of an adapter, for good."""
    return AdaptedBase(base).put_on(folder)


def check_targets(found: PreTrainedConfig, config: AdapterConfig, trust_remote_code: bool) -> None:
    """Refuse target modules that the model does not have, or that are no linear layers.

    Args:
        found: the configuration of the base.
        config: the section `model.adapter`.
        trust_remote_code: as in the section `model`.

    Raises:
        InputError: naming the target.
    """
    names = _wrapped(found, config, trust_remote_code)
    for target in config.target_modules if config.targets != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _no_such_layer(target)


def check_fits(folder: Path, found: PreTrainedConfig, name: str, trust_remote_code: bool) -> None:
    """Refuse an adapter whose weights do not belong to a base. Shapes are compared, no weights.

    Args:
        folder: the adapter's folder.
        found: the configuration of the base.
        name: the base, for the error.
        trust_remote_code: as in the section `model`.

    Raises:
        InputError: naming a weight that differs.
    """
    import peft

    shapes = adapter_shapes(folder)
    problem = f"model.path: {folder}: this adapter does not belong to {name}"
    advice = f"set base_model_name_or_path in its {ADAPTER_CONFIG} to its own base"
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        with _quietly():
            model = peft.get_peft_model(_on_meta(found, trust_remote_code), config)
        expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{problem} ({error}); {advice}") from None
    needed = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    # PEFT may save whole embeddings beside an adapter.
    given = {key: shape for key, shape in shapes.items() if key in needed or ".lora_" in key}
    for key in sorted(needed.keys() | given.keys()):
        if needed.get(key) != given.get(key):
            there, here = (str(of.get(key, "none")) for of in (given, needed))
            raise InputError(
                f"{problem}: {key} has the shape {there} in the adapter and {here} in the model; "
                f"{advice}"
            )


def check_continues(
    folder: Path,
    saved: Any,
    found: PreTrainedConfig,
    config: AdapterConfig,
    trust_remote_code: bool,
) -> None:
    """Refuse an adapter as θ_0 that `model.adapter` would not train further as it is.

    Args:
        folder: the adapter's folder.
        saved: the content of its adapter_config.json.
        found: the configuration of its base.
        config: the section `model.adapter`.
        trust_remote_code: as in the section `model`.

    Raises:
        InputError: rank, scaling or layers differ, or it is not a plain LoRA adapter.
    """
    lora = read_lora(folder, saved)
    wanted = _wrapped(found, config, trust_remote_code)
    if config.each_iteration == "fresh":
        if not lora.modules <= wanted:
            raise InputError(
                f"model.adapter.target_modules: {list(config.target_modules)}: the adapter in "
                f"{folder} has other layers too ({_some(lora.modules - wanted)}); a new adapter "
                f"on top of it needs them; set them to [{_kinds(lora.modules | wanted)}]"
            )
        return
    given = LoraWeights(config.rank, config.scaling, wanted)
    if given != lora:
        raise InputError(
            f"model.adapter: {_described(given)}: the adapter in {folder} has "
            f"{_described(lora)}; use these values to train it "
            "further, set model.adapter.each_iteration to fresh to train a new adapter on top of "
            "it, or remove model.adapter to merge it into its base"
        )


def complete_adapter(folder: Path, base: Base) -> None:
    """Turn what PEFT has saved into a checkpoint that others can use, always with the same bytes.

    PEFT names the folder that the base was loaded from, lists the target modules in any order, and
    adds an empty model card.

    Args:
        folder: the adapter's folder.
        base: the base of the adapter.
    """
    path = folder / ADAPTER_CONFIG
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved |= {"base_model_name_or_path": base.name, "revision": base.revision}
    if isinstance(saved["target_modules"], list):
        saved["target_modules"].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _load(base: PreTrainedModel, folder: str, *, is_trainable: bool) -> PeftModel:
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    # As `disable_dropout` does: only the modules change.
    config.lora_dropout = 0.0
    with _quietly():
        return peft.PeftModel.from_pretrained(
            base, folder, config=config, is_trainable=is_trainable, torch_device=str(base.device)
        )


def _stack(
    base: PreTrainedModel, folder: str | None, config: AdapterConfig, seed: int
) -> PeftModel:
    """A new adapter on top of an earlier one, as one adapter: ΔW = s₁B₁A₁ + s₂B₂A₂.

    A = [A₁; A₂] and B = [B₁·s₁/s, B₂] with s = s₂. The earlier ranks come first. B₂ = 0.
    """
    import peft
    import torch
    from safetensors.torch import load_file

    earlier: dict[str, torch.Tensor] = {}
    rank, scaling = 0, config.scaling
    if folder is not None:
        saved = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        lora = read_lora(Path(folder), saved)
        earlier = load_file(Path(folder) / ADAPTER_WEIGHTS)
        rank, scaling = lora.rank, lora.scaling
    settings = lora_settings(config, rank + config.rank)
    with torch.random.fork_rng(devices=[]), _quietly():
        torch.manual_seed(seed)
        policy = peft.get_peft_model(base, settings)
    ratio = scaling / (settings.lora_alpha / settings.r)
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad or rank == 0:
            continue
        kept = earlier.get(name.replace(f".{_NAME}.", "."))
        if ".lora_A." in name:
            parameter.data[:rank] = 0.0 if kept is None else kept.to(parameter)
        elif kept is not None:
            parameter.data[:, :rank] = kept.to(parameter) * ratio
    return policy


def with_new_adapter(model: PreTrainedModel, config: AdapterConfig, rank: int) -> PeftModel:
    """A model with a new adapter of any rank, whose weights are where the model's are."""
    import peft

    with _quietly():
        return peft.get_peft_model(model, lora_settings(config, rank))


def lora_settings(config: AdapterConfig, rank: int) -> LoraConfig:
    """PEFT's configuration of an adapter of any rank with the scaling of `model.adapter`."""
    import peft

    alpha: Any = config.scaling * rank
    return peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=config.targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _wrapped(
    found: PreTrainedConfig, config: AdapterConfig, trust_remote_code: bool
) -> frozenset[str]:
    """Names of the layers that get an adapter. All are linear, and none is the output head."""
    import peft
    from peft.tuners.lora import Linear

    model = _on_meta(found, trust_remote_code)
    head = model.get_output_embeddings()
    try:
        with _quietly():
            policy = peft.get_peft_model(model, lora_settings(config, config.rank))
    except ValueError as error:
        raise InputError(
            f"model.adapter.target_modules: {list(config.target_modules)}: {error}"
        ) from None
    inner = policy.get_base_model()
    layers = {n: m for n, m in inner.named_modules() if hasattr(m, "base_layer")}
    for name, layer in layers.items():
        if not isinstance(layer, Linear) or layer.base_layer is head:
            what = "the output head" if layer.base_layer is head else "not a linear layer"
            raise InputError(
                f"model.adapter.target_modules: {list(config.target_modules)}: {name} is {what}; "
                "name linear layers other than the output head, or use all-linear"
            )
    return frozenset(layers)


def _on_meta(found: PreTrainedConfig, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # allocates no memory for the weights
        return AutoModelForCausalLM.from_config(found, trust_remote_code=trust_remote_code)


def _no_such_layer(target: str) -> InputError:
    return InputError(
        f"model.adapter.target_modules: {target!r}: the model has no linear layer of this name; "
        "use all-linear, or names such as q_proj"
    )


def _described(lora: LoraWeights) -> str:
    return (
        f"rank {lora.rank}, alpha {lora.rank * lora.scaling:g}, target_modules "
        f"[{_kinds(lora.modules)}] in {len(lora.modules)} layers"
    )


def _kinds(names: frozenset[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _some(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)[:3])
