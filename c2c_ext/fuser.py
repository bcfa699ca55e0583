"""Fuser: the learned network between two KV-caches, as an nn.Module, and its packed form."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import FuserConfig
from .model_kv import KVShape
from .packed import PackedFuser, pack_fuser
from .parameters import ATTENTION_NAMES, group_parameter_shapes, parameter_shapes
from .reference import AttentionWeights, BlockWeights, StreamWeights

if TYPE_CHECKING:
    from .model_card import CardInfo


class FuserGroup(nn.Module):
    """Parameters of all streams of one shape group, stacked along dim 0.

    The streams are those of the group's first layer, then of its second and so on; within a layer
    one per kind of ``config.kinds``. Which parameters exist depends on the variant (see
    `c2c_ext.parameters`).
    """

    def __init__(self, config: FuserConfig, layers: list[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.kinds = config.kinds
        sharer, receiver = config.layer_shapes(layers[0])
        self.sharer_shape: KVShape = sharer
        self.receiver_shape: KVShape = receiver
        for name, shape in group_parameter_shapes(config, layers).items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters(config.gate_init)

    def reset_parameters(self, gate_init: float) -> None:
        """PyTorch's default initialisation of linear layers; norms 1; gates ``gate_init``."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("_norm"):
                    parameter.fill_(1.0)
                elif name == "gate_logit":
                    parameter.fill_(gate_init)
                else:
                    matrix = getattr(self, name.replace("_bias", "_weight"))
                    bound = matrix.shape[-1] ** -0.5
                    parameter.uniform_(-bound, bound)

    def stream(self, index: int, dtype: torch.dtype | None = None) -> StreamWeights:
        """Views of stream ``index`` (position in this group), optionally cast."""

        def at(name: str) -> Tensor | None:
            parameter = getattr(self, name, None)
            if parameter is None:
                return None
            return parameter[index].to(dtype) if dtype is not None else parameter[index]

        return stream_weights(at)

    def streams(self) -> Callable[[int, torch.dtype | None], StreamWeights]:
        """`stream` for all of them: a backward through every stream's views stacks gradients once.

        Through `stream` it adds up one tensor of the whole parameter's size per stream.
        """
        unbound: dict[str, tuple[Tensor, ...] | None] = {}

        def stream(index: int, dtype: torch.dtype | None = None) -> StreamWeights:
            def at(name: str) -> Tensor | None:
                if name not in unbound:
                    parameter = getattr(self, name, None)
                    unbound[name] = None if parameter is None else parameter.unbind(0)
                views = unbound[name]
                if views is None:
                    return None
                return views[index] if dtype is None else views[index].to(dtype)

            return stream_weights(at)

        return stream

    def open_streams(self) -> list[int]:
        """Indices of the streams whose gate is open. Syncs with the host."""
        count = len(self.layers) * len(self.kinds)
        if not hasattr(self, "gate_logit"):
            return list(range(count))
        return [g for g, is_open in enumerate((self.gate_logit > 0).tolist()) if is_open]

    def place(self, stream: int) -> tuple[int, str]:
        """(receiver layer, kind) of a stream."""
        return self.layers[stream // len(self.kinds)], self.kinds[stream % len(self.kinds)]


def stream_weights(at: Callable[[str], Tensor | None]) -> StreamWeights:
    """One stream's weights from its parameters by name (`c2c_ext.parameters`); None: none such."""

    def block(name: str) -> BlockWeights | None:
        parts = [at(f"{name}_{part}") for part in ("norm", "w1", "w2")]
        return None if parts[0] is None else BlockWeights(*parts)

    proj = [at(f"proj_{part}") for part in ("norm", "w1", "w2")]
    attention = {name: at(name) for name in ATTENTION_NAMES}
    return StreamWeights(
        in_weight=at("in_weight"),
        in_bias=at("in_bias"),
        shared=block("shared"),
        proj=[] if proj[0] is None else [BlockWeights(*w) for w in zip(*proj, strict=True)],
        out_weight=at("out_weight"),
        out_bias=at("out_bias"),
        weight=block("weight"),
        head_weight=at("head_weight"),
        head_bias=at("head_bias"),
        gate_logit=at("gate_logit"),
        attention=None if attention["query_norm"] is None else AttentionWeights(**attention),
    )


class Fuser(nn.Module):
    """A fuser from one sharer to one receiver (arXiv 2510.03215, section 3).

    Parameters live in ``groups`` (`FuserGroup`), stacked per shape group. `c2c_ext.fuse` and
    attached models use the packed form, built on first use for a dtype and device and rebuilt
    when any parameter has been written to, stepped by an optimizer, replaced, cast or moved.
    While gradients are pending (``p.grad`` is not None) it is built anew on every use. Writes
    through ``.data`` (or assigning to it), to inference tensors, and by a fused optimizer whose
    gradients were set by hand leave no trace that PyTorch reports: call `repack` after them. A
    function compiled by `torch.compile` takes the form that the last eager use has built.

    Args:
        config: shapes, layer map and initial values.
    """

    def __init__(self, config: FuserConfig) -> None:
        super().__init__()
        if not isinstance(config, FuserConfig):
            raise TypeError(f"Fuser: config must be a FuserConfig, got {type(config).__name__}")
        self._config = config
        self.groups = nn.ModuleList(FuserGroup(config, layers) for layers in config.shape_groups())
        self._place = {
            layer: (g, i)
            for g, group in enumerate(self.groups)
            for i, layer in enumerate(group.layers)
        }
        self._watched: dict[int, tuple[Tensor, RemovableHandle]] = {}  # by id
        self._packs: dict[tuple[torch.dtype, torch.device], tuple[Any, Any, PackedFuser]] = {}
        self._only: tuple[torch.dtype, torch.device] | None = None

    @property
    def config(self) -> FuserConfig:
        """What the parameters are of; may be replaced by one that asks for the same shapes."""
        return self._config

    @config.setter
    def config(self, config: FuserConfig) -> None:
        if not isinstance(config, FuserConfig):
            raise TypeError(f"Fuser: config must be a FuserConfig, got {type(config).__name__}")
        self._check_has_parameters("given another config")
        old = self._config
        layers = range(len(old.layer_map))
        if (
            len(config.layer_map) != len(old.layer_map)
            or any(config.layer_shapes(i) != old.layer_shapes(i) for i in layers)
            or dict(parameter_shapes(config)) != dict(parameter_shapes(old))
        ):
            raise ValueError(
                "Fuser: config must ask for the parameters' shapes; for others make a new Fuser"
            )
        self._config = config

    @property
    def inference_only(self) -> bool:
        """Whether it was loaded with ``inference_dtype``: a packed form without parameters."""
        return self._only is not None

    def stream(self, layer: int, kind: str, dtype: torch.dtype | None = None) -> StreamWeights:
        """Parameter views of one stream.

        Args:
            layer: receiver layer.
            kind: ``"key"`` or ``"value"``.
            dtype: cast to, if given.

        Raises:
            ValueError: no such layer or kind.
        """
        if layer not in self._place:
            raise ValueError(
                f"Fuser.stream: layer must be in 0..{len(self._place) - 1}, got {layer}"
            )
        kinds = self.config.kinds
        if kind not in kinds:
            known = " or ".join(map(repr, kinds))
            raise ValueError(f"Fuser.stream: kind must be {known}, got {kind!r}")
        group, index = self._place[layer]
        return self.groups[group].stream(len(kinds) * index + kinds.index(kind), dtype)

    def open_streams(self) -> list[tuple[int, str]]:
        """(receiver layer, kind) of every open stream: its gate logit is > 0, or it has no gate.

        Syncs with the host.
        """
        if self._only is not None:
            return sorted(
                (layer, "key" if i < group.num_keys else "value")
                for group in self._packs[self._only][2].groups
                for i, layer in enumerate(group.layers)
            )
        return sorted(group.place(g) for group in self.groups for g in group.open_streams())

    def packed(self, dtype: torch.dtype, device: torch.device) -> PackedFuser:
        """The packed form for caches of ``dtype`` on ``device``; rebuilt when stale.

        Under `torch.compile` the form that exists is used as it is, without looking at the
        parameters, so call ``fuser.packed(dtype, device)`` once before compiling.

        Raises:
            RuntimeError: inside `torch.compile` before the packed form was built.
            ValueError: a variant that the compiled op does not run; or the fuser was loaded for
                inference with caches of another dtype or device only.
        """
        key = (dtype, device)
        if self._only is not None:
            if key != self._only:
                raise ValueError(
                    f"c2c_ext: fuser was loaded for {self._only[0]} caches on {self._only[1]} only "
                    f"(inference_dtype), got {dtype} on {device}"
                )
            return self._packs[key][2]
        if torch.compiler.is_compiling():
            if key not in self._packs:
                raise RuntimeError(
                    f"c2c_ext: call fuser.packed({dtype}, torch.device('{device}')) once before "
                    "torch.compile"
                )
            return self._packs[key][2]
        # Fused optimizers write without counting up the version, so a form is only kept while no
        # gradient waits to be stepped, and forgotten when one arrives.
        if any(p.grad is not None for p in self.parameters()):
            self._packs.clear()
            return pack_fuser(self, dtype, device)
        held = self._packs.get(key)
        if held is None or not self._unchanged(*held[:2]):
            self._watch_gradients()
            held = (self.config, self._state(), pack_fuser(self, dtype, device))
            self._packs[key] = held
        return held[2]

    def repack(self) -> None:
        """Forgets every packed form; the next use builds anew from the parameters.

        Raises:
            RuntimeError: the fuser was loaded for inference only and has no parameters.
        """
        self._check_has_parameters("repacked")
        self._packs.clear()

    def _check_has_parameters(self, verb: str) -> None:
        if self._only is not None:
            raise RuntimeError(
                f"c2c_ext: fuser cannot be {verb}: it was loaded for inference only "
                "(inference_dtype) and holds no parameters"
            )

    def _watch_gradients(self) -> None:
        for _, handle in self._watched.values():
            handle.remove()
        own = weakref.ref(self)

        def forget(_: Tensor) -> None:
            fuser = own()
            if fuser is not None:
                fuser._packs.clear()

        self._watched = {
            id(p): (p, p.register_post_accumulate_grad_hook(forget))
            for p in self.parameters()
            if p.requires_grad and p.is_leaf
        }

    def _state(self) -> list[tuple[Tensor, tuple]]:
        # The parameters themselves: the id of one that was replaced can be given out again.
        return [(p, _written(p)) for p in self.parameters()]

    def _unchanged(self, config: FuserConfig, state: list[tuple[Tensor, tuple]]) -> bool:
        parameters = list(self.parameters())
        return (
            config is self.config
            and len(parameters) == len(state)
            and all(
                known is p
                and written == _written(p)
                and (not p.requires_grad or id(p) in self._watched)
                for p, (known, written) in zip(parameters, state, strict=True)
            )
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Fuser:
        self._check_has_parameters("cast or moved")
        self.repack()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; refused where there are no parameters to load into."""
        self._check_has_parameters("loaded into")
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if self._only is not None:
            return dict(self.__dict__)
        return {**self.__dict__, "_packs": {}, "_watched": {}}

    def extra_repr(self) -> str:
        c = self.config
        parts = [
            f"{c.sharer.model_type or '?'} -> {c.receiver.model_type or '?'}",
            f"{len(c.kinds) * len(c.layer_map)} streams",
        ]
        if c.projection != "linear":
            parts += [f"hidden_size={c.hidden_size}", f"depth={c.depth}"]
        return ", ".join([*parts, *(f"{name}={v!r}" for name, v in c.variant().items())])

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, card: CardInfo | None = None
    ) -> None:
        """Writes fuser_config.json, fuser.safetensors and the model card README.md.

        Each file appears whole or not at all. A README.md that c2c_ext has not written stays as it
        is; one that it has is written anew.

        Args:
            card: what the model card says beyond what the fuser knows; without it, training,
                metrics and licence are "not recorded".

        Raises:
            ValueError: a parameter is missing, surplus, misshapen, NaN or infinite, or the
                parameters' dtypes differ; names it. Nothing is written.
            NotADirectoryError: ``save_directory`` is an existing file.
        """
        from .serialization import save_fuser

        save_fuser(self, save_directory, card)

    @classmethod
    def from_pretrained(
        cls,
        directory_or_repo_id: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        inference_dtype: torch.dtype | None = None,
        inference_device: torch.device | str = "cpu",
    ) -> Fuser:
        """Loads what `save_pretrained` wrote, from a directory or from the Hugging Face Hub.

        An existing directory is always taken; only a string of the form ``"org/name"`` is looked
        up on the Hub (of which ``HF_ENDPOINT`` gives the address). The two files are fetched by
        name, and nothing else of the repository.

        Args:
            revision: branch, tag or commit of the repository.
            token: a Hub token; True: the stored one is needed; False: none is sent.
            cache_dir: where downloads are kept, if not in the Hub's usual cache.
            local_files_only: take what was downloaded before, without network.
            force_download: download even what was downloaded before.
            inference_dtype: keep only the packed form for caches of this dtype. Weights are read
                and folded stream by stream, so that the parameters are never in memory as a whole.
                Such a fuser fuses the same bits, but cannot be trained, changed, cast, moved or
                saved. The default keeps the parameters and packs on first use.
            inference_device: of those caches; only with ``inference_dtype``.

        Raises:
            FileNotFoundError: the directory or repository, the revision or one of the two files
                is missing.
            PermissionError: the Hub refuses access.
            ConnectionError: the Hub cannot be reached, and nothing was downloaded before.
            ValueError: a tensor is missing, surplus, misshapen, of another dtype, NaN or
                infinite, a configuration value is out of range, or a file is larger than it may
                be; the message names it. Or ``inference_dtype`` is no dtype of caches, or given for
                a variant that has no packed form.
        """
        from .hub import load_pretrained
        from .inference_only import loader

        return load_pretrained(
            directory_or_repo_id,
            loader(inference_dtype, inference_device),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: CardInfo | None = None,
        commit_message: str = "Push fuser",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes, as one commit; creates the repository if needed.

        Through `huggingface_hub.ModelHubMixin`. A README.md in the repository that c2c_ext has not
        written stays as it is.

        Args:
            repo_id: ``"org/name"``, or ``"name"`` for the user whom the token belongs to.
            card: as in `save_pretrained`.
            private: whether a repository that is created is private.
            token: a Hub token; the stored one if not given.
            branch: an existing branch; ``main`` if not given.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as in `save_pretrained`, before anything is sent, or a bad ``repo_id``.
            PermissionError: the Hub refuses access.
            FileNotFoundError: no such branch.
            ConnectionError: the Hub cannot be reached.
        """
        from .hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            card=card,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
        )

    @classmethod
    def from_published(
        cls, directory: str | os.PathLike, *, receiver_config: Any = None, sharer_config: Any = None
    ) -> Fuser:
        """Loads a fuser in the on-disk format of the public research code.

        Args:
            directory: holds ``projector_config.json`` and ``projector_{i}.pt/.json``.
            receiver_config, sharer_config: transformers configurations. The format does not store
                the sharer's layer count or either model's identity: given, they are recorded and
                checked; otherwise the highest sharer layer in use is taken as its last.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: anything missing, surplus, misshapen, NaN or contradictory; names it.
        """
        from .published import load_published

        return load_published(
            directory, receiver_config=receiver_config, sharer_config=sharer_config
        )

    def save_published(self, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes the on-disk format of the public research code, which `from_published` reads.

        Every tensor arrives bit for bit. The format has no place for the models' names and types,
        for sharer layers beyond the last one in use and for ``gate_init``.

        Args:
            directory: appears whole or not at all.
            overwrite: replace a fuser that is there.

        Raises:
            ValueError: the published projector cannot compute what this fuser computes (names
                the field), or a parameter is damaged; nothing is written.
            FileExistsError: ``directory`` holds files, and ``overwrite`` is false or some are
                not a fuser's.
        """
        from .published_writer import save_published

        save_published(self, directory, overwrite=overwrite)


def _written(p: Tensor) -> tuple:
    """Version and place of a parameter: changes with any write that autograd tracks."""
    return (-1 if p.is_inference() else p._version, p.data_ptr(), p.dtype, p.device)
