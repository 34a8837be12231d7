"""What one process of benchmarks.speed measures: the models of one depth, taking turns.

python -m benchmarks.worker      (settings by line, as JSON, and their answers; from one to the next the models stay)

A method is the name behind transformer_, and may say what of admin_fairseq.fast.measured is on: admin:loss+adam, or
admin:all and admin:off.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from argparse import Namespace
from typing import Any, Dict, Iterable, NamedTuple

import numpy as np
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

import admin_fairseq
from admin_fairseq.fast.measured import MEASURED
from admin_fairseq.model import AdminModel
from admin_fairseq.omega import sub_layers
from benchmarks.common import peak_memory

TRAIN = """--optimizer adam --adam-betas (0.9,0.98) --lr-scheduler inverse_sqrt --lr 5e-4 --warmup-updates 4000
--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0.1 --seed 1
--required-batch-size-multiple 1 --num-workers 0 --distributed-world-size 1 --no-save --log-format none"""
AS_IT_IS = dict(MEASURED)
NO_ROOM = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
reset_peak = torch.cuda.reset_peak_memory_stats  # before compare_methods takes it from the trainer
WARMUP = 2  # updates before the clock counts: the first ones allocate the optimizer's state
Answer = Dict[str, Any]  # by method, seconds of every round and counts; {"out of memory": True} where they do not fit
Setting = Dict[str, Any]  # what to measure


PARTS = {  # of an update's time, by the operations that take it
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product"),
    "random numbers": ("bernoulli_", "random_"),
    "LayerNorm and softmax": ("native_layer_norm", "_softmax", "_log_softmax"),
    "the rest of torch": ("",),
}
SHARES = (*PARTS, "Python")


class Clock:
    """Seconds of forward pass, backward pass and the whole of ``Trainer.train_step``."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.marks = trainer, {}
        self.cuda = trainer.cuda
        trainer.criterion.register_forward_pre_hook(lambda *_: self.mark("forward"))
        trainer.criterion.register_forward_hook(lambda *_: self.mark("forward"))
        optimizer, backward = trainer.optimizer, trainer.optimizer.backward

        def timed(loss: torch.Tensor) -> None:
            self.mark("backward")
            backward(loss)
            self.mark("backward")

        optimizer.backward = timed

    def mark(self, name: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.marks.setdefault(name, []).append(time.perf_counter())

    def step(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """Of one update; a step that fp16's loss scale skipped is none, and is made again with half of it."""
        updates = self.trainer.get_num_updates()
        while self.trainer.get_num_updates() == updates:
            self.marks = {}
            self.mark("step")
            self.trainer.train_step(samples, raise_oom=True)
            self.mark("step")
        seconds = {name: sum(times[1::2]) - sum(times[::2]) for name, times in self.marks.items()}
        seconds["optimizer"] = seconds["step"] - seconds["forward"] - seconds["backward"]
        return seconds


class Variant(NamedTuple):
    """What ``--methods`` names: METHOD[:FEATURES][/DTYPE]."""

    method: str
    features: str | None  # of the table of faster computations, by "+"; None: as the table is
    dtype: str

    @classmethod
    def of(cls, name: str, setting: Setting) -> Variant:
        name, _, dtype = name.partition("/")
        method, says, features = name.partition(":")
        return cls(method, features if says else None, dtype or setting["dtype"])


def make_trainer(name: str, setting: Setting) -> Trainer:
    variant, (encoder, decoder) = Variant.of(name, setting), setting["depth"].split("-")
    argv = [setting["data"], "--arch", f"transformer_{variant.method}", "--decoder-layers", decoder]
    if variant.method.startswith("lm_"):
        argv += ["--task", "language_modeling", "--sample-break-mode", "eos"]
    else:
        argv += ["--encoder-layers", encoder]
    argv += [*TRAIN.split(), "--max-tokens", str(setting["max_tokens"]), "--save-dir", setting["folder"]]
    argv += {"fp32": [], "fp16": ["--fp16"], "bf16": ["--bf16"]}[variant.dtype]
    argv += ["--cpu"] if setting["device"] == "cpu" else []
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*argv, *setting["extra"]]))
    task = tasks.setup_task(cfg.task)
    if not variant.method.startswith("lm_"):
        cfg.model.share_all_embeddings = task.source_dictionary == task.target_dictionary
    task.load_dataset("train")
    torch.manual_seed(cfg.common.seed)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    trainer.optimizer  # noqa: B018  (builds it, after the pre-pass)
    return trainer


def use(variant: Variant) -> None:
    """Have the table of faster computations name on this device what the variant does, or be as it is."""
    if variant.features is None:
        MEASURED.update(AS_IT_IS)
        return
    here = frozenset({"cpu", *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])})
    for feature in MEASURED:
        MEASURED[feature] = here if variant.features == "all" or feature in variant.features.split("+") else frozenset()


def make_clock(method: str, setting: Setting) -> Clock:
    use(Variant.of(method, setting))
    return Clock(make_trainer(method, setting))


def answer(setting: Setting, clocks: dict[str, Clock] | None = None) -> Answer:
    """What is measured; ``clocks``, to which new ones are added, are of a setting that differed in batches alone."""
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    try:
        return compare_methods(setting, {} if clocks is None else clocks)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in NO_ROOM):
            raise
        return {"out of memory": True}


def compare_methods(setting: Setting, clocks: dict[str, Clock]) -> Answer:
    for method in setting["methods"]:
        clocks[method] = clocks.get(method) or make_clock(method, setting)
    trainers = {method: clock.trainer for method, clock in clocks.items()}
    first = next(iter(trainers.values()))
    cuda = first.cuda
    if cuda:
        torch.cuda.empty_cache()
        reset_peak()
        torch.cuda.reset_peak_memory_stats = lambda *_: None  # the trainer would reset it after every update
    first.cfg.dataset.max_tokens = setting["max_tokens"]
    each_update = first.cfg.optimization.update_freq[0]
    batches, of_all = sample_batches(first, (WARMUP + setting["rounds"]) * each_update)
    updates = [batches[i : i + each_update] for i in range(0, len(batches), each_update)]
    rounds: dict[str, list[dict[str, float]]] = {method: [] for method in trainers}
    for number, samples in enumerate(updates):
        for method in in_turn(clocks, number):
            use(Variant.of(method, setting))
            seconds = clocks[method].step(samples)
            if number >= WARMUP:
                rounds[method].append({**seconds, **counts(samples, trainers[method])})
    found: Answer = {"rounds": rounds, "parameters": {}, "prepass": {}, "generation": {}, "matmul": {}, "parts": {}}
    found["updates_an_epoch"] = of_all / each_update
    found["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_memory(os.getpid())
    for method, trainer in trainers.items():
        model = trainer.get_model()
        found["parameters"][method] = sum(p.numel() for p in model.parameters())
        if isinstance(model, AdminModel) and setting["prepass"]:
            use(Variant.of(method, setting))
            found["prepass"][method] = prepass(trainer, clocks[method], batches[0], setting["rounds"])
    if setting["matmul"]:
        for method, trainer in trainers.items():
            found["matmul"][method] = matmul_rate(next(trainer.get_model().parameters()))
            if not cuda:
                use(Variant.of(method, setting))
                found["parts"][method] = parts(clocks[method], updates[0])
    if setting["generate"]:
        found["generation"] = generate(trainers, batches[0], setting)
    return found


def parts(clock: Clock, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of an update's time, which add up to 1; what no operation of torch takes is Python and its calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        whole = clock.step(samples)["step"]
    shares = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            name = event.key[len("aten::") :]
            part = next(part for part, names in PARTS.items() if name in names or name.startswith(names[-1]))
            shares[part] += event.self_cpu_time_total / 1e6 / whole
    return {**shares, "Python": max(0.0, 1 - sum(shares.values()))}


def in_turn(methods: Iterable[str], number: int) -> list[str]:
    """The methods in the order of a round: each is the first as often as the others."""
    order = list(methods)
    return order[number % len(order) :] + order[: number % len(order)]


def sample_batches(trainer: Trainer, count: int) -> tuple[list[dict[str, Any]], int]:
    """Batches of short, middling and long sentences in random order; and how many there are in all."""
    iterator = trainer.get_train_iterator(1, load_dataset=False, disable_iterator_cache=True)
    dataset, chosen = trainer.task.dataset("train"), iterator.frozen_batches
    places = np.linspace(0, max(0, len(chosen) - 2), count).astype(int)  # the last one may be small
    np.random.RandomState(1).shuffle(places)
    return [dataset.collater([dataset[i] for i in chosen[place]]) for place in places], len(chosen)


def counts(samples: list[dict[str, Any]], trainer: Trainer) -> dict[str, int]:
    """Target tokens of an update's batches, and its FLOPs."""
    cfg, padding = trainer.cfg.model, trainer.task.target_dictionary.pad()
    d, vocabulary = cfg.decoder_embed_dim, len(trainer.task.target_dictionary)
    decoder = cfg.decoder_layers * (4 * d * d + 2 * d * cfg.decoder_ffn_embed_dim) + d * vocabulary
    tokens = multiplications = 0
    for sample in samples:
        sides = sample["net_input"]
        is_pair = "prev_output_tokens" in sides  # and not a language model's text
        source = sides["src_tokens"].ne(padding).sum(1)
        target = sides["prev_output_tokens"].ne(padding).sum(1) if is_pair else source
        multiplications += target.sum() * decoder + 2 * d * cfg.decoder_layers * (target**2).sum()
        if is_pair:
            encoder = cfg.encoder_layers * (4 * d * d + 2 * d * cfg.encoder_ffn_embed_dim)
            multiplications += source.sum() * (encoder + cfg.decoder_layers * 2 * d * d)
            multiplications += target.sum() * cfg.decoder_layers * 2 * d * d
            multiplications += 2 * d * (cfg.encoder_layers * source**2 + cfg.decoder_layers * source * target).sum()
        tokens += int(target.sum())
    return {"tokens": tokens, "flops": 3 * 2 * int(multiplications)}


def prepass(trainer: Trainer, clock: Clock, batch: dict[str, Any], rounds: int) -> list[float]:
    """Pre-passes on a batch, each in units of a training forward pass beside it."""
    model, ratios = trainer.get_model(), []
    norms = [norm for stack in model.stacks().values() for norm in sub_layers(stack).values()]
    before = [norm.omega.detach().clone() for norm in norms]
    sample, _ = trainer._prepare_sample(batch)
    for _ in range(rounds):
        clock.marks = {}
        model.train()
        trainer.criterion(model, sample)
        clock.mark("profile")
        admin_fairseq.profile(model, [admin_fairseq.Sample(sample["net_input"], True, 1)])
        clock.mark("profile")
        (start, end), (begin, finish) = clock.marks["forward"], clock.marks["profile"]
        ratios.append((finish - begin) / (end - start))
    with torch.no_grad():
        for norm, omega in zip(norms, before):
            norm.omega.copy_(omega)
    return ratios


def generate(trainers: dict[str, Trainer], batch: dict[str, Any], setting: Setting) -> dict[str, list[float]]:
    """Seconds of beam search, by method and round; as fairseq-generate, to a fixed length."""
    search = Namespace(beam=setting["beam"], max_len_a=0, max_len_b=setting["length"], min_len=setting["length"])
    generators = {}
    seconds: dict[str, list[float]] = {method: [] for method in trainers}
    for method, trainer in trainers.items():
        trainer.zero_grad()
        model = trainer.get_model()
        model.eval()
        model.prepare_for_inference_(trainer.cfg)
        generators[method] = trainer.task.build_generator([model], search)
    for number in range(1 + setting["rounds"]):
        for method in in_turn(trainers, number):
            use(Variant.of(method, setting))
            trainer = trainers[method]
            sample, _ = trainer._prepare_sample(batch)
            if trainer.cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            trainer.task.inference_step(generators[method], [trainer.get_model()], sample)
            if trainer.cuda:
                torch.cuda.synchronize()
            seconds[method].append(time.perf_counter() - started)
    return {method: each[1:] for method, each in seconds.items()}


def matmul_rate(like: torch.Tensor) -> float:
    """FLOPs a second of the product of two large square matrices, the best of several."""
    n = 8192 if like.is_cuda else 1024
    a, b = (torch.randn(n, n, device=like.device).to(like.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if like.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if like.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


if __name__ == "__main__":
    logging.disable(logging.INFO)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints is no answer
    kept: dict[str, Clock] = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), kept)), file=out, flush=True)
