"""The scheduler's half of the connector: vLLM requests → planner.

Nothing a client sends may raise here: unusable params are counted and prefilled locally.
"""

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import RequestStatus

from kvconnect.config import PeerConfig, read_secret
from kvconnect.control.wire import Address
from kvconnect.errors import OfferError, OwnLeaseError
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.lease import Terms
from kvconnect.orders import Blocks, Offer, Order
from kvconnect.planner import Planner
from kvconnect.stats import StatsData, labelled
from kvconnect.vllm import _compat, leaving
from kvconnect.vllm.adapter_reports import scheduler_adapters
from kvconnect.vllm.early_loads import EarlyLoads
from kvconnect.vllm.held import LEASED, LOADING, NEXT_TURN, HeldBlocks
from kvconnect.vllm.idle import IdleSteps
from kvconnect.vllm.params import PREFIX_BYTES, TICKET_VERSION, Prompt, Ticket, token_kinds
from kvconnect.vllm.prefill_progress import PrefillProgress
from kvconnect.vllm.protocol import NOWHERE, EngineInfo, RouterProtocol
from kvconnect.vllm.turns import LentTurns
from kvconnect.vllm.undecided import Undecided
from kvconnect.vllm.windows import Windows, held_from
from kvconnect.vllm.worker import RankMetadata

logger = logging.getLogger(f"vllm.{__name__}")

SAMPLE = re.compile(r"\d+_")  # vLLM's names of the samples of a prompt begin so (ParentRequest)
MAX_UNDECIDED = 4096
SHORTENED = "_kvconnect_shortened"  # attribute of a vLLM request
EXIT_S = 2.0  # that an engine takes to end once its leases are over


class Scheduler:
    """One per engine. Not thread-safe: vLLM's scheduler calls it."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        config: PeerConfig,
        protocol_type: type[RouterProtocol] = RouterProtocol,
    ) -> None:
        ours = vllm_config.kv_transfer_config
        secret = read_secret(config.auth_secret_file, config.require_auth)
        self._us = EngineInfo(ours.engine_id, secret, config.kv_lease_duration, ours.kv_role)
        self._protocol = protocol_type(self._us, config, vllm_config)
        self._undecided = Undecided()
        # request that was offered what this engine leases itself → lease id, request id
        self._own: dict[str, tuple[str | None, str]] = {}
        self._groups = _compat.transfer_group_ids(kv_cache_config)
        self._group_sizes = [
            kv_cache_config.kv_cache_groups[g].kv_cache_spec.block_size for g in self._groups
        ]
        parallel = vllm_config.parallel_config
        self._sizes = {
            "tp_size": parallel.tensor_parallel_size,
            "dcp_size": parallel.decode_context_parallel_size,
            "pp_size": parallel.pipeline_parallel_size,
        }
        self._windows = Windows(kv_cache_config, self._groups)
        self._backoff = _backoff(vllm_config, kv_cache_config)
        self._planner = Planner()
        self.progress = PrefillProgress(self._planner, vllm_config, kv_cache_config)
        self.early_loads = EarlyLoads(
            self._planner,
            kv_cache_config.num_blocks,
            self._group_sizes,
            vllm_config.model_config.max_model_len,
        )
        ttl_s = getattr(config, "decoder_kv_blocks_ttl", 0.0)
        self.turns = LentTurns(ttl_s, vllm_config, kv_cache_config)
        self._turns_threshold = getattr(config, "kv_recompute_threshold", 0)
        self._held = HeldBlocks()
        self.idle_steps = IdleSteps(vllm_config)
        self._traced: dict[str, Mapping[str, str]] = {}  # loads that were ordered → their headers
        self.lent: dict[str, Any] = {}
        """Finished requests, by id, whose blocks are kept for readers."""
        self.drain_s = config.drain_timeout
        """How long leases may be read once the engine is asked to end."""
        if killed_after_s := _compat.shutdown_timeout_s(vllm_config):
            self.drain_s = min(self.drain_s, max(killed_after_s - EXIT_S, 0))
        self.adapters = scheduler_adapters(vllm_config)
        self._shards: tuple[tuple[Address, str], ...] = ((NOWHERE, "unnamed"),)
        self._world_size = parallel.world_size
        self.waits_for_workers = False
        """Whether their addresses come with a step's results: until then there are no tickets."""
        self._known_ranks: dict[int, RankMetadata] = {}

    def bind(self, block_pool: Any) -> None:
        """vLLM's block pool, once there is one."""
        self._windows.bind(block_pool)
        self.turns.bind(block_pool)

    def set_xfer_handshake_metadata(self, ranks: Mapping[tuple[int, int], RankMetadata]) -> None:
        """All workers are up; ``ranks`` by (pp_rank, tp_rank)."""
        known = [rank for _, rank in sorted(ranks.items())]
        self._shards = tuple((Address(rank.host, rank.link_port), rank.key) for rank in known)
        self._protocol.addresses_known([Address(rank.host, rank.port) for rank in known])
        self.early_loads.ask_again()
        self._planner.addresses_known(
            tuple(Address(rank.host, rank.link_port, rank.key) for rank in known)
        )

    def addresses_known(self, ranks: Mapping[int, RankMetadata]) -> None:
        """Some workers have said where they are, by rank; it may be known already."""
        self._known_ranks |= ranks
        if self.waits_for_workers and len(self._known_ranks) == self._world_size:
            self.waits_for_workers = False
            self.set_xfer_handshake_metadata(
                {(0, rank): one for rank, one in self._known_ranks.items()}
            )

    # -- as vLLM schedules ---------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """A new request: note its offer, promise its KV."""
        self.adapters.arrived(request)
        if self._protocol.lends(request):
            self._shorten(request)
            if leaving.asked_at is None:
                name = self._protocol.name(request)
                self._planner.promise(request.request_id, name)
                if self._protocol.is_read_early(request):
                    self.progress.add(request, name)
        if self._protocol.loads(request):
            self._note(request)

    def get_num_new_matched_tokens(self, request: Any, local_tokens: int) -> int | None:
        """Tokens to load beyond those cached here; None: not known yet. No effect."""
        request_id = request.request_id
        if request_id in self._undecided or self._windows.holds_back(request_id):
            return None
        if self._planner.waits(request_id):
            return None
        if self._protocol.lends(request):
            if self.adapters.undecided(request):
                return None
            self.adapters.begin(request)
        self.cached(request, local_tokens)
        tokens = self._planner.match(request_id, local_tokens)
        if tokens < self._turns_threshold and self._protocol.lends(request):
            return 0
        if tokens and self.adapters.digest(request) == "":
            self._count("num_stale_weights", "loaded")
            return 0
        if not tokens:
            return 0
        if self.early_loads.may_begin(request_id, tokens):
            return tokens
        self.turns.forget(request_id)  # it wants no blocks yet
        return None

    def cached(self, request: Any, local_tokens: int) -> None:
        """Tokens that vLLM's own prefix cache has; vLLM asks with them, but a chain does not."""
        self.adapters.cached(request, local_tokens)
        self.turns.asked(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """Blocks were allocated, of which ``tokens`` are to be loaded."""
        request_id = request.request_id
        self._release_own(request_id)
        self.early_loads.begins(request_id, tokens)
        self.turns.admitted(request)
        if tokens and (offer := self._planner.offer(request_id)) is not None:
            blocks_to_fill = self._wanted(blocks, offer.tokens)
            needed_from = self.needed_from(request_id, blocks_to_fill, offer)
            self._planner.fetch(request_id, blocks_to_fill, needed_from)
            self._held.hold(LOADING, request_id, sum(map(len, blocks_to_fill)))
            if headers := getattr(request, "trace_headers", None):
                self._traced[request_id] = dict(headers)
        else:  # all of it is here already, or vLLM chose not to load
            self._windows.done(request_id)
            self._planner.release(request_id)

    def take_offer(self, request: Any) -> Offer | None:
        """The request's offer; its load, and its release, are the caller's from now on."""
        self.early_loads.begins(request.request_id, request.num_prompt_tokens)
        self.turns.admitted(request)
        return self._planner.take_offer(request.request_id)

    def needed_from(self, request_id: str, blocks: Blocks, offer: Offer) -> tuple[int, ...]:
        """From where on the blocks to fill are needed of an offer; see `kvconnect.orders.Fetch`.

        One that is needed in part is in no prefix cache once it is loaded.
        """
        needed_from = self._windows.needed_from(offer.tokens, offer.held_from)
        self._windows.load(request_id, blocks, needed_from)
        return needed_from if any(needed_from) else ()

    def update_connector_output(self, request_ids: Sequence[str]) -> None:
        """All ranks ended these loads."""
        for request_id in request_ids:
            self._planner.received(request_id)
            self._windows.received(request_id)
            self.early_loads.ended(request_id)
            self.turns.received(request_id)
            if (seconds := self._held.free(LOADING, request_id)) is not None:
                self._planner.stats.observe("handover_seconds", seconds)

    def sent(self, request_ids: Iterable[str]) -> None:
        """The leases of these requests are over on all ranks."""
        self._planner.sent(request_ids)
        self.turns.over(request_ids)
        for request_id in request_ids:
            self.lent.pop(request_id, None)
            for cause in (LEASED, NEXT_TURN):
                if self._held.free(cause, request_id) is not None:
                    self._count("num_leases", "ended")

    def revoke(self, request_ids: Iterable[str]) -> None:
        """The blocks of these requests are wanted back: their readers are late."""
        if revoked := self._planner.revoke(request_ids):
            self._count("num_leases", "revoked", revoked)
            logger.info("kvconnect: %d leases are revoked", revoked)

    @property
    def has_orders(self) -> bool:
        """Whether there are orders that no step has taken."""
        return self._planner.has_orders

    def request_finished(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request ended; says whether its blocks are lent, and with which params."""
        self._planner.end(request.request_id)
        self._windows.done(request.request_id)
        self.early_loads.forget(request.request_id)
        self._release_own(request.request_id)
        adapter = self.adapters.digest(request)
        if adapter is not None and self.adapters.mixed(request):
            adapter = ""
        self.adapters.ended(request.request_id)
        self.turns.forget(request.request_id)
        lends, sample = self._protocol.lends(request), SAMPLE.match(request.request_id)
        if not lends and (sample or not self._protocol.lends_back(request)):
            return False, None
        tables = [block_ids[g] for g in self._groups]
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        computed = request.status in (
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_STOPPED,
        )
        late = leaving.asked_at is not None and not self._planner.has_promised(request.request_id)
        if not computed or tokens <= 0 or not any(tables) or adapter == "" or late:
            terms = None
        elif lends:
            terms = self._terms(request, tables, Prompt(request, adapter), tokens)
        else:
            terms = self.turns.lend(request, tables, adapter)
        if terms is None:
            self._planner.withdraw(request.request_id)
            self._count("num_leases", "withdrawn", lends)
            self._count("num_stale_weights", "lent", adapter == "")
        else:
            self.lent[request.request_id] = request
            self._held.hold(
                LEASED if lends else NEXT_TURN, request.request_id, sum(map(len, terms.tables))
            )
        params = None if terms is None else self._lend(request, terms)
        self.progress.ended(request.request_id)
        return terms is not None, params

    def take_orders(self) -> list[Order]:
        """Orders for every worker, since the last call: once per step."""
        self._decide()
        self._drain()
        if wanted := self.turns.to_revoke(everything=leaving.asked_at is not None):
            self.revoke(wanted)
        return self._planner.take_orders()

    def take_traced(self) -> Mapping[str, Mapping[str, str]]:
        """Requests whose loads were ordered since the last call, and what tells their traces."""
        taken, self._traced = self._traced, {}
        return taken

    def take_stats(self) -> StatsData | None:
        """What was counted here since the last call; None if nothing."""
        self._held.report(self._planner.stats)
        return self._planner.stats.take()

    def _count(self, name: str, what: str, times: int = 1) -> None:
        self._planner.stats.count(labelled(name, what), times)

    def close(self) -> None:
        """The engine ends. Idempotent."""
        self._protocol.close()

    def _note(self, request: Any) -> None:
        """Note the offer of a request that has arrived, or have it found out."""
        about = self._protocol.asks_about(request)
        if len(self._undecided) >= MAX_UNDECIDED:
            why = f"{MAX_UNDECIDED} requests wait for where their prefill is to be found out"
            self._take(request, self._unusable(request, why))
        elif self._undecided.waits_for(about) or not self._look(request):
            self._undecided.add(about, request)

    def _decide(self) -> None:
        """Note the offers that are known by now; release those of requests that ended meanwhile.

        Requests that wait for the same answer are looked at once: the first one is.
        """
        for about in self._undecided.asked():
            while (request := self._undecided.first(about)) and self._look(request):
                self._undecided.remove(about, request)

    def _drain(self) -> None:
        """End the leases of an engine that ends, once they had their time to be read."""
        asked_at = leaving.asked_at
        if asked_at is None or not self.lent or time.monotonic() < asked_at + self.drain_s:
            return
        if late := self._planner.revoke(list(self.lent)):
            self._count("num_leases", "revoked", late)
            logger.warning(
                "kvconnect: %d leases were not read within %.0f s of the signal to end",
                late,
                self.drain_s,
            )

    def _look(self, request: Any) -> bool:
        """Note what a request offers, if it is known by now."""
        offer: Offer | None
        try:
            offer = self._offer(request)
        except OwnLeaseError as e:
            self._own[request.request_id], offer = (e.lease_id, e.request_id), None
        except OfferError as e:
            offer = self._unusable(request, str(e))
        else:
            if offer is None:
                return False
        self._take(request, offer)
        return True

    def _unusable(self, request: Any, why: str) -> Offer | None:
        """What is left of an unusable offer: a lease to let go, or nothing."""
        self._planner.stats.count("num_invalid_params")
        logger.warning(
            "request %s: what it says of its KV is unusable, it is prefilled here: %s",
            request.request_id,
            why,
        )
        return self._protocol.unusable(request)

    def _take(self, request: Any, offer: Offer | None) -> None:
        request_id = request.request_id
        if offer is not None:
            if SAMPLE.match(request_id):
                offer = offer._replace(source=replace(offer.source, samples=True))
            self._planner.renew(request_id, offer)
        if request.is_finished() or (offer is not None and not offer.tokens):
            self._planner.end(request_id)  # nothing to fetch: its lease is let go at once
        if request.is_finished():
            self._release_own(request_id)

    def _release_own(self, request_id: str) -> None:
        """The request holds its blocks, or needs none: a lease of our own on them may end."""
        if (own := self._own.pop(request_id, None)) is not None:
            self._planner.release_own(*own)

    def _offer(self, request: Any) -> Offer | None:
        if getattr(request, "abort_immediately", False):  # never runs; its prompt is a dummy
            return self._protocol.unused(request)
        if self.adapters.undecided(request):
            return None
        if (adapter := self.adapters.begin(request)) == "":
            self._count("num_stale_weights", "loaded")
            raise OfferError("which weights its adapter has is not known here")
        backoff = 0 if hasattr(request, SHORTENED) else self._backoff
        return self._protocol.offer(request, Prompt(request, adapter, backoff))

    def _terms(self, request: Any, tables: list[list[int]], prompt: Prompt, tokens: int) -> Terms:
        """On which a prompt that was computed is leased."""
        kept = tuple(
            tuple(b if b != _compat.NULL_BLOCK else NO_BLOCK for b in table[: -(-tokens // size)])
            for table, size in zip(tables, self._group_sizes, strict=True)
        )
        digest, name = prompt.digest(tokens), self._protocol.name(request)
        return Terms(request.request_id, "", kept, tokens, digest, self._us.ttl_s, name)

    def _lend(self, request: Any, terms: Terms) -> dict[str, Any] | None:
        self.progress.granted(request.request_id, terms.tables, terms.digest)
        lease_id = self._planner.grant(terms)
        self._count("num_leases", "granted")
        ticket = Ticket(
            version=TICKET_VERSION,
            engine_id=self._us.engine_id,
            lease_id=lease_id,
            request_id=request.request_id,
            tokens=terms.tokens,
            digest=terms.digest,
            ttl_ms=round(terms.ttl_s * 1000),
            shards=self._shards,
            held_from=held_from(terms.tables, self._group_sizes, NO_BLOCK),
            step=min(terms.prefixes, default=0),
            prefixes=b"".join(digest[:PREFIX_BYTES] for digest in terms.prefixes.values()),
        )
        named = [[b for b in table if b != NO_BLOCK] for table in terms.tables]
        return self._protocol.answer(request, ticket, named, self._sizes)

    def _shorten(self, request: Any) -> None:
        """Compute only what can be handed over: recurrent state cannot step back a token.

        As in-tree ``_truncate_request_for_prefill``; the decode engine computes the rest. Once,
        however many connectors of ours an engine has.
        """
        backoff = self._backoff
        if not backoff or request.num_prompt_tokens <= backoff or hasattr(request, SHORTENED):
            return
        if request.get_skip_reading_prefix_cache():
            return
        # a prompt may be of both; vLLM's workers end where its parts are not of one length
        for tokens in (request.prompt_token_ids, token_kinds(request)):
            if tokens is not None:
                del tokens[-backoff:]
        if request.prompt_embeds is not None:
            request.prompt_embeds = request.prompt_embeds[:-backoff]
        del request._all_token_ids[-backoff:]
        request.num_prompt_tokens -= backoff
        request.max_tokens = 1
        setattr(request, SHORTENED, True)

    def _wanted(self, blocks: Any, tokens: int) -> Blocks:
        """Blocks to fill, those of the first ``tokens`` that no prefix cache hit filled."""
        return tuple(
            tuple(
                (place, block.block_id)
                for place, block in enumerate(blocks.blocks[group][: -(-tokens // size)])
                if block.block_hash is None and not block.is_null
            )
            for group, size in zip(self._groups, self._group_sizes, strict=True)
        )


def _backoff(vllm_config: Any, kv_cache_config: Any) -> int:
    """Trailing prompt tokens that the decode engine computes itself (in-tree _prefill_backoff).

    One for recurrent state, which cannot step back, and for sliding windows: after a full hit
    vLLM computes the last token again, whose window then starts one token before the blocks
    that were kept for the token after it.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    one_less = getattr(kv_cache_config, "has_mamba_layers", False) or any(
        getattr(spec, "prefix_replay_tokens", 0) > 0 or isinstance(spec, SlidingWindowSpec)
        for spec in specs
    )
    return max(int(one_less), getattr(vllm_config, "num_prefill_lookahead_tokens", 0) - 1, 0)
