"""PEFT's configurations of adapters from outside: what is supported, and what is refused by name."""

from __future__ import annotations

from typing import Any

from verl.config.roles import LoraConfig
from verl.utils.hub import AdapterFolder

_SHAPE = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "fan_in_fan_out",
)
# Without effect on what the adapter computes.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "runtime_config",
    "task_type",
)
# Others change the weights that the adapter is added to, such as pissa.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


def adapter_options(adapter: AdapterFolder, peft: Any) -> Any:
    """PEFT's configuration of an adapter whose values are read afterwards.

    Raises:
        ValueError: a kind of adapter, or a feature, that is not supported; names it.
    """
    settings, where = adapter.settings, adapter.folder / "adapter_config.json"
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"need a LoRA adapter, got peft_type {settings.get('peft_type')!r} in {where}; merge it into its "
            "base with PEFT, and give the folder of the merged model"
        )
    usual = {**peft.LoraConfig().to_dict(), "revision": "main"}
    unsupported = [
        f"{name}={value!r}"
        for name, value in settings.items()
        if name not in (*_SHAPE, *_WITHOUT_EFFECT, "init_lora_weights")
        and value not in (usual.get(name), None, False, [], {})
    ]
    if settings.get("init_lora_weights") not in _INITIAL:
        unsupported.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if unsupported:
        raise ValueError(
            f"need a LoRA adapter without {', '.join(unsupported)}, got it in {where}; merge the adapter "
            "into its base with PEFT, and give the folder of the merged model"
        )
    return peft.LoraConfig(
        **{name: settings[name] for name in _SHAPE if settings.get(name) is not None}, init_lora_weights=False
    )


def continued_options(adapter: AdapterFolder, config: LoraConfig, peft: Any) -> Any:
    """PEFT's configuration of an adapter whose training goes on, with the dropout of the settings.

    Raises:
        ValueError: as `adapter_options`, or a setting contradicts the adapter.
    """
    options = adapter_options(adapter, peft)
    targets, modules = options.target_modules, options.modules_to_save or ()
    own: dict[str, Any] = {
        "rank": options.r,
        "alpha": float(options.lora_alpha),
        "targets": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "modules_to_save": tuple(sorted(modules)),
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
    }
    usual = LoraConfig()
    for name, value in own.items():
        given, default = (vars(section)[name] for section in (config, usual))
        given_set = tuple(sorted(given)) if isinstance(given, tuple) else given
        if given != default and given_set != value:
            raise ValueError(
                f"need the {name} of the adapter in {adapter.source}, {value}, got lora.{name} {given}; "
                f"leave it out, or merge the adapter: policy.path={adapter.source} without lora.path"
            )
    options.lora_dropout = config.dropout
    return options
