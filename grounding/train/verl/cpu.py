"""The CPU path: verl's own `main_ppo` on a machine without a GPU, through verl's plug-in hooks.

It is for the demo and for tests, because verl does not support it. Everything except the rollout engine is verl's code. We add a platform
`cpu` (gloo) and a rollout server `hf`, which answers verl's agent loop by transformers' `generate`. Every process of the run loads them by
`VERL_USE_EXTERNAL_MODULES=grounding.train.verl.plugin_cpu VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda`. The device is cuda because verl
registers its FSDP engine only under that name.

The same seed gives the same run, resumed or not: prompts have numbers instead of random names, the server waits for all requests of a step,
sorts them and seeds its sampling by step, and the replay buffer returns trajectories in order of their numbers.
"""

from __future__ import annotations

import verl  # noqa: F401  # in a run, this also imports `plugin_cpu`

import grounding.train.verl.cpu_platform  # noqa: F401  # registers the platform; must come before other imports of verl
from grounding.jsontypes import JsonObject

# isort: split
import asyncio
import os
from collections import defaultdict
from typing import Any

import ray
import torch
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput
from verl.workers.rollout.utils import get_vision_placeholder_token_ids

from grounding.models import experts, families
from grounding.runtime.environment import RlEnvironment

_BATCH_WAIT_S = 20.0


class OrderedReplayBuffer(ReplayBuffer):  # type: ignore[misc]
    """verl's replay buffer, returning trajectories in order of prompt and rollout instead of arrival."""

    def _select_prompt_uids(self, partition_id: str, sampleable_keys: set[str], batch_size: int) -> Any:
        _, snapshot, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        return sorted(sampleable_keys)[:batch_size], snapshot, steps

    def _materialize_batch(self, partition_id: str, selected: list[str], snapshot: dict[str, JsonObject]) -> Any:
        def place(key: str) -> tuple[str, list[int]]:
            uid, *numbers = key.split("_")
            return uid, [int(n) for n in numbers]

        ordered = {key: snapshot[key] for key in sorted(snapshot, key=place)}
        return super()._materialize_batch(partition_id, selected, ordered)


# ---- the rollout engine ----
def _server_name(rank: int) -> str:
    return f"hf_cpu_rollout_{rank}"


class HFServerAdapter(BaseRollout):  # type: ignore[misc]
    """The training process's side of the rollout engine: passes new weights to the rollout server."""

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        state = {name: tensor.detach().cpu() for name, tensor in weights}
        # there is one rollout server per rank, and each gets the complete weights from its rank
        await ray.get_actor(_server_name(torch.distributed.get_rank())).load_weights.remote(state, global_steps)


class HFServer:
    """Answers generation requests in batches: all requests of one step together, sorted by their numbers."""

    def __init__(self, path: str, response_length: int, rollouts: int, seed: int) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.response_length, self.rollouts, self.seed = response_length, rollouts, seed
        self.model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32)
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.step: int | None = None
        self._waiting: dict[tuple[Any, ...], list[tuple[str, list[int], Any, asyncio.Future[TokenOutput]]]] = (
            defaultdict(list)
        )
        self._timers: dict[tuple[Any, ...], asyncio.TimerHandle] = {}

    async def load_weights(self, state: dict[str, torch.Tensor], step: int | None) -> None:
        # verl has split the experts' weights for vLLM
        result = self.model.load_state_dict(experts.stacked(state), strict=False)
        missing = [key for key in result.missing_keys if "lm_head" not in key]  # tied to the embeddings
        if missing or result.unexpected_keys:
            raise RuntimeError(
                f"the weights do not match the model: missing {missing}, unexpected {result.unexpected_keys}"
            )
        self.step = step

    async def generate(
        self, prompt_ids: list[int], sampling_params: JsonObject, request_id: str, image_data: Any = None, **_: Any
    ) -> TokenOutput:
        temperature = float(sampling_params.get("temperature", 1.0))
        key = (
            temperature,
            float(sampling_params.get("top_p", 1.0)),
            max(0, int(sampling_params.get("top_k", 0) or 0)),
            int(min(self.response_length, sampling_params.get("max_tokens") or self.response_length)),
            bool(sampling_params.get("logprobs")),
        )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[TokenOutput] = loop.create_future()
        waiting = self._waiting[key]
        waiting.append((request_id, prompt_ids, image_data, future))
        if key in self._timers:
            self._timers.pop(key).cancel()
        given = RlEnvironment.from_environ(os.environ)
        expected = given.rollouts_a_step if temperature > 0 else given.rollouts_a_validation
        if expected and len(waiting) >= expected:
            self._run(key)
        else:  # fewer requests than expected means that one failed before it arrived
            self._timers[key] = loop.call_later(_BATCH_WAIT_S if expected else 0.2, self._run, key)
        return await future

    def _run(self, key: tuple[Any, ...]) -> None:
        self._timers.pop(key, None)
        waiting = sorted(self._waiting.pop(key, []), key=lambda item: (len(item[0]), item[0]))
        for start in range(0, len(waiting), 128):
            part = waiting[start : start + 128]
            try:
                outputs = self._generate([(ids, images) for _, ids, images, _ in part], key, start)
            except Exception as error:
                for *_, future in part:
                    future.set_exception(error)
                continue
            for (*_, future), output in zip(part, outputs, strict=True):
                future.set_result(output)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _generate(self, requests: list[tuple[list[int], Any]], key: tuple[Any, ...], part: int) -> list[TokenOutput]:
        temperature, top_p, top_k, length, want_logprobs = key
        pad = self.processor.tokenizer.pad_token_id
        width = max(len(ids) for ids, _ in requests)
        ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids, _ in requests])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in requests])
        inputs: JsonObject = {"input_ids": ids, "attention_mask": mask}
        images = [image for _, images in requests for image in images or []]
        config = self.model.config
        if images:
            inputs |= families.seen(self.processor, images)
            if "image_grid_thw" in inputs:
                inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        sampling: JsonObject = {"do_sample": temperature > 0}
        if temperature > 0:
            torch.manual_seed((self.seed * 1_000_003 + (self.step or 0)) * 1_009 + part)
            sampling |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        out = self.model.generate(
            **inputs,
            **sampling,
            max_new_tokens=length,
            return_dict_in_generate=True,
            output_logits=want_logprobs,
            suppress_tokens=get_vision_placeholder_token_ids(self.processor),
        )
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        new = out.sequences[:, width:]
        logprobs = None
        if want_logprobs:
            logits = torch.stack(out.logits, 1).float() / (temperature if temperature > 0 else 1.0)
            logprobs = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        results = []
        for row, tokens in enumerate(new.tolist()):
            stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            results.append(
                TokenOutput(
                    token_ids=tokens[:stop],
                    log_probs=None if logprobs is None else logprobs[row, :stop].tolist(),
                    stop_reason="completed",
                    extra_fields={"global_steps": self.step},
                )
            )
        return results

    async def nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing. A GPU engine would manage its memory, cache and profiler here."""

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = nothing
    release_kv_cache = resume_kv_cache = start_profile = stop_profile = wait_for_requests_to_drain = nothing


class HFReplica(RolloutReplica):  # type: ignore[misc]
    """One rollout server as a Ray actor without CPU slots."""

    async def launch_servers(self) -> None:
        model = self.model_config
        path = model["path"] if isinstance(model, dict) else model.path
        server = (
            ray.remote(HFServer)
            .options(name=_server_name(self.replica_rank), max_concurrency=4096, num_cpus=0)
            .remote(path, self.config.response_length, self.config.n, RlEnvironment.from_environ(os.environ).seed)
        )
        self.servers = [server]
        self._server_handle, self._server_address = server, "127.0.0.1:0"

    async def init_hybrid(self, worker_group: Any) -> None:
        self.rollout_mode, self.workers = RolloutMode.HYBRID, worker_group.workers
        await self.launch_servers()
