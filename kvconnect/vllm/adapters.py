"""Which weights an adapter's name stands for, as the workers loaded them.

vLLM names an adapter by a name, a path and a number. Files may be written anew at a path, a name
may be pointed elsewhere, and a number may be loaded in place; vLLM also reads an adapter again by
itself once it has been pushed out of its cache. So only what loads an adapter knows it.

* `watch`, in each worker's process, has vLLM's own loading note a digest of the tensors that it
  loaded; of adapters that come in another way it notes that they are not known.
* A worker's `LoadedAdapters` tells the scheduler's half, `Adapters`, with each step's results:
  what it loaded, and the number of the step before which that was all.
* An adapter that no worker has loaded yet, or that ranks do not all know, is not known; a request
  with it is computed here, and its KV is neither handed over nor stored.
* A request for an adapter that is loaded in place waits for the results of one step, which were
  computed after it came: until then a load may have happened that is not known here.
"""

import functools
import hashlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvconnect.vllm.adapter_reports import AdapterReport, Loaded

logger = logging.getLogger(f"vllm.{__name__}")

MARK = "_kvconnect_digest"  # attribute of vLLM's LoRAModel
WHOLE = 1 << 20  # bytes of a tensor; of a larger one, pages
PAGE, PAGES = 16 << 10, 64
SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


# -- in a worker's process -------------------------------------------------------------------

loaded_here: dict[int, tuple[int, Loaded]] = {}  # adapter's number → when it was noted, what
notes = 0


def watch() -> bool:
    """Have vLLM note what it loads from now on, in this process; whether it can. Idempotent."""
    try:
        from vllm.lora import model_manager
        from vllm.lora.lora_model import LoRAModel

        managers: list[Any] = [
            one
            for one in vars(model_manager).values()
            if isinstance(one, type)
            and issubclass(one, model_manager.LoRAModelManager)
            and "add_adapter" in vars(one)
        ]
        made = vars(LoRAModel)["from_lora_tensors"]
        if hasattr(made.__func__, MARK):
            return True
        for manager in managers:
            manager.add_adapter = _noting(manager.add_adapter)
        LoRAModel.from_lora_tensors = classmethod(_marking(made.__func__))
    except (ImportError, AttributeError, KeyError) as e:
        logger.warning(
            "kvconnect: this vLLM loads adapters in a way that is not known (%r); KV of requests "
            "with adapters is neither handed over nor stored; see docs/identity.md",
            e,
        )
        return False
    return True


def _marking(make: Any) -> Any:
    """``from_lora_tensors``, which also says in the model what it was made of."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def marking(cls: Any, *args: Any, **kwargs: Any) -> Any:
        digest = ""
        try:
            told = signature.bind(cls, *args, **kwargs).arguments
            digest = digest_of(told["tensors"], told["peft_helper"])
        except Exception as e:
            logger.warning("kvconnect: what an adapter is made of is not known: %r", e)
        model = make(cls, *args, **kwargs)
        setattr(model, MARK, digest)
        return model

    setattr(marking, MARK, True)
    return marking


def _noting(add: Any) -> Any:
    """``add_adapter``, which also notes what the number stands for now."""

    @functools.wraps(add)
    def noting(self: Any, adapter: Any) -> Any:
        added = add(self, adapter)
        if added:
            note(adapter.id, getattr(adapter, MARK, ""))
        return added

    return noting


def note(number: int, digest: str) -> None:
    """An adapter was loaded in this process; ``digest`` "" where it is not known which."""
    global notes
    before = loaded_here[number][1] if number in loaded_here else Loaded(digest, 0)
    changed = digest != before.digest or not digest
    notes += 1
    loaded_here[number] = notes, Loaded(digest, before.changes + changed)


def digest_of(tensors: Mapping[str, torch.Tensor], peft_helper: Any) -> str:
    """The digest of an adapter's tensors, by their names in its file, and of how they are scaled.

    Pages, spread evenly, stand for a tensor of more than `WHOLE` bytes.
    """
    scaling = {name: getattr(peft_helper, name, None) or None for name in SCALING}
    digest = hashlib.blake2b(repr(scaling).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        if data.nbytes <= WHOLE:
            digest.update(data)
            continue
        for page in range(PAGES):
            start = (data.nbytes - PAGE) * page // (PAGES - 1)
            digest.update(data[start : start + PAGE])
    return digest.hexdigest()


class LoadedAdapters:
    """What this process has loaded that one scheduler's half has not been told yet."""

    def __init__(self) -> None:
        self._told = 0  # notes
        self._step = 0
        watch()

    def bound(self, step: int) -> None:
        """The metadata of this step is here; its forward comes."""
        self._step = step

    def take(self, rank: int) -> AdapterReport:
        """With a step's results."""
        report = AdapterReport(self._step)
        if self._told < notes:
            report.loaded = {
                number: {rank: loaded}
                for number, (noted, loaded) in loaded_here.items()
                if noted > self._told
            }
            self._told = notes
        return report


# -- in the scheduler's process --------------------------------------------------------------


@dataclass
class _AdapterUse:
    """What is known of the adapter of a request."""

    step: int
    """The last that was made when it came."""
    first: tuple[str, int] | None = None
    """Digest and changes when the request began."""
    cached: bool = False
    """Whether vLLM's prefix cache had some of its KV."""


class Adapters:
    """What requests' adapters stand for. Not thread-safe: vLLM's scheduler calls it."""

    def __init__(self, ranks: int, applied: str = "") -> None:
        """``ranks``: how many must have said what they loaded; ``applied``: to which modules."""
        self._ranks = ranks
        self._applied = applied
        self._loaded: dict[int, dict[int, Loaded]] = {}
        self._digests: dict[int, set[str]] = {}  # number → the first two that it stood for
        self._numbers: dict[tuple[str, str], set[int]] = {}  # name and path → numbers
        self._asked: dict[str, _AdapterUse] = {}
        self._step = 0  # made last
        self._reported = 0  # the step whose results came last
        self._warned: set[str] = set()

    def next_step(self) -> int:
        """Number of the metadata that is made now."""
        self._step += 1
        return self._step

    def received(self, report: AdapterReport | None) -> None:
        """With a step's results."""
        if report is None:
            return
        self._reported = max(self._reported, report.step)
        for number, ranks in report.loaded.items():
            self._loaded[number] = self._loaded.get(number, {}) | ranks
            known = self._digests.setdefault(number, set())
            if len(known) < 2 and (digest := self._now(number)[0]):
                known.add(digest)

    def arrived(self, request: Any) -> None:
        """Each request, once or more, before anything is asked about it; until it `ended`."""
        if (lora := request.lora_request) is None or request.request_id in self._asked:
            return
        self._asked[request.request_id] = _AdapterUse(self._step)
        self._numbers.setdefault((lora.lora_name, lora.lora_path), set()).add(lora.lora_int_id)

    def ended(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        self._asked.pop(request_id, None)

    def cached(self, request: Any, tokens: int) -> None:
        """So many tokens of the request were in vLLM's prefix cache."""
        if tokens and (asked := self._asked.get(request.request_id)) is not None:
            asked.cached = True

    def undecided(self, request: Any) -> bool:
        """Whether a step's results may still say what the request's adapter is."""
        asked = self._asked.get(request.request_id)
        if asked is None or self._reported > asked.step:
            return False
        lora = request.lora_request
        return lora.load_inplace or not self._now(lora.lora_int_id)[0]

    def begin(self, request: Any) -> str | None:
        """As `digest`, once it is not `undecided`, and before any of its KV is there."""
        if (asked := self._asked.get(request.request_id)) is not None:
            asked.first = asked.first or self._now(request.lora_request.lora_int_id)
        return self.digest(request)

    def digest(self, request: Any) -> str | None:
        """What KV of a request depends on; None: no adapter; "": not known, or it has changed."""
        if (lora := request.lora_request) is None:
            return None
        now = self._now(lora.lora_int_id)
        asked = self._asked.get(request.request_id)
        if not now[0] or asked is None or asked.first != now:
            self._warn(lora)
            return ""
        return f"{now[0]} {getattr(lora, 'is_3d_lora_weight', False)} {self._applied}".rstrip()

    def mixed(self, request: Any) -> bool:
        """Whether vLLM's prefix cache may have given it KV of what the adapter was before.

        vLLM's blocks are named by the adapter's name and path alone.
        """
        asked = self._asked.get(request.request_id)
        if asked is None or not asked.cached:
            return False
        lora = request.lora_request
        numbers = self._numbers.get((lora.lora_name, lora.lora_path), set())
        return len(set().union(*(self._digests.get(n, set()) for n in numbers))) > 1

    def _now(self, number: int) -> tuple[str, int]:
        """Digest of what all ranks have loaded, "" if some did not say; and its changes."""
        ranks = self._loaded.get(number, {})
        digests = {loaded.digest for loaded in ranks.values()}
        changes = sum(loaded.changes for loaded in ranks.values())
        if len(ranks) < self._ranks or "" in digests:
            return "", changes
        if len(digests) > 1:  # each rank has only its experts
            each = " ".join(loaded.digest for _, loaded in sorted(ranks.items()))
            return hashlib.blake2b(each.encode(), digest_size=16).hexdigest(), changes
        return digests.pop(), changes

    def _warn(self, lora: Any) -> None:
        if lora.lora_name not in self._warned:
            self._warned.add(lora.lora_name)
            logger.warning(
                "kvconnect: which weights adapter %.200r has is not known, or has just changed: "
                "KV of requests with it is neither handed over nor stored until the engine has "
                "loaded it; see docs/identity.md",
                lora.lora_name,
            )
