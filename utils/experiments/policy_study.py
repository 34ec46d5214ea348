"""The policies of the study: trials, training, and evaluation on the test prompts.

    python -m utils.experiments.policy_study                   # all that is missing
    python -m utils.experiments.policy_study scalar ordinal:1  # arms, or one seed of an arm
    python -m utils.experiments.policy_study trials            # hyper-parameters, on validation
    python -m utils.experiments.policy_study tests             # evaluate all on the test prompts

The reward models and the judge are the published ones. A policy lands in
runs/cpu/policies/<arm>/seed<seed>, its evaluation in the folder `test` there; what was stopped goes
on from its last checkpoint. `python -m utils.experiments.published` copies what is there into
results/, `make study` does both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.arms.policies import ARMS, AVERAGE, AVERAGE_SCALES, TRIALS, policy_folder
from utils.experiments import study
from utils.experiments.alignment import held_out_metrics
from utils.experiments.comparison import Comparison
from utils.experiments.environment import quiet
from utils.experiments.pipeline import (
    SAMPLING_FIELDS,
    load_sft,
    open_stage,
    prepared_data,
    runs_dir,
    stage_config,
)
from utils.experiments.policy_stages import (
    POLICY_FIELDS,
    base_profile,
    load_trained,
    policy_stage,
    scale_stage,
    trained_policies,
    trial_stage,
)
from utils.experiments.published import load_published, published_sums
from utils.experiments.storage import Run
from utils.files import ResultsError
from utils.reinforce.averaging import average_adapters
from utils.reinforce.loop import TrainingStopped

TEST_FIELDS = ("data", "model", "evaluation", *SAMPLING_FIELDS)
REWARDS = ("scalar", "ordinal", "judge")  # by which every policy is evaluated
# Noise of its own: the pool shares no draw with an evaluation.
POOL: dict[str, Any] = {"evaluation.seed": 5432, "evaluation.samples_per_prompt": 16}


def average_stage(name: str, arm: str, seeds: Mapping[int, str]) -> Run:
    """Evaluate the average of an arm's seeds on the validation prompts by scale, or find it done.

    `run.json` then holds `scale`, the one with the highest reward within the KL budget.

    Args:
        name: of the stage, below `sweeps`.
        arm: whose seeds.
        seeds: which of them, trained, with the hash of their configuration.

    Raises:
        ResultsError: if every scale is beyond the budget.
    """
    profile, kind = base_profile(), ARMS[arm].reward
    facts = {"reward": kind, "readout": "mean", "models": published_sums((kind, "judge"))}
    facts |= {"average_of": [*seeds.values()], "scales": AVERAGE_SCALES}
    config = stage_config(profile, POLICY_FIELDS, **facts)
    run, finished = open_stage(profile, f"sweeps/{name}", config)
    if not finished:
        (run.directory / "metrics.csv").unlink(missing_ok=True)  # of one that was stopped
        held_out = {"own": kind, "judge": "judge"}
        scorers = {role: load_published(name) for role, name in held_out.items()}
        scales = {role: scale_stage(name) for role, name in held_out.items()}
        prompts = prepared_data(profile).prompts("validation")
        for scale in AVERAGE_SCALES:
            average = _load_average(arm, seeds, scale)
            metrics = held_out_metrics(*average, prompts, profile, scorers, scales)
            print(f"[{run.label}] scale {scale}: {metrics}", flush=True)
            run.log({"scale": scale, **metrics})
        table, budget = run.metrics(), profile.reinforce.kl_budget
        if (within := table[table["eval_kl"] <= budget]).empty:
            raise ResultsError(f"{name}: no scale is within {budget} nats, try smaller ones")
        run.finish(scale=within.loc[within["eval_reward"].idxmax(), "scale"].item())
    return run


def evaluation_stages() -> dict[str, pd.DataFrame]:
    """Evaluate the controls, what is trained, and averages of seeds on the test prompts.

    Returns:
        Rows of `evaluate_policy` by policy, with the rewards in SFT standard deviations.
    """
    profile = base_profile()
    reward_models = {name: load_published(name) for name in REWARDS}
    facts = {"models": published_sums(REWARDS)}
    scales = {name: scale_stage(name) for name in REWARDS}
    comparison = Comparison(profile, reward_models, TEST_FIELDS, facts, scales)
    temperature = profile.reinforce.temperature
    frames = comparison.controls()
    # Its KL to the SFT model is zero, so the reference need not read it.
    frames["sft_pool"] = comparison.evaluate(
        "sft_pool", comparison.sft, temperature, reference=False, changes=POOL
    )
    trained = [*trained_policies()]
    for name, seed, shaped_by in trained:
        evaluate = partial(
            comparison.evaluate, load=partial(load_trained, name, seed), trained=shaped_by
        )
        policy, folder = f"{name}_s{seed}", f"{policy_folder(name, seed)}/test"
        frames[policy] = evaluate(policy, temperature=temperature, folder=folder)
        if seed == 0:
            policy, folder = f"{policy}_greedy", f"{folder}_greedy"
            frames[policy] = evaluate(policy, temperature=0.0, folder=folder)
    for name, seeds in _complete(trained):
        first = min(seeds)
        # What of the average's gain the scale alone would have brought.
        average_stage(f"scaled_{name}", name, {first: seeds[first]})
        scale = average_stage(f"average_{name}", name, seeds).info["scale"]
        load = partial(_load_average, name, seeds, scale)
        policy, shaped_by = f"{name}_{AVERAGE}", {"trained": [*seeds.values()], "scale": scale}
        frames[policy] = comparison.evaluate(
            policy, load, temperature, folder=f"policies/{policy}/test", **shaped_by
        )
    return frames


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.experiments.policy_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stages", nargs="*", metavar="ARM[:SEED] | trials | tests", help="default: all"
    )
    stages = ("trials", *ARMS, "tests")
    wanted = parser.parse_args(arguments).stages or stages
    known = (*stages, *study.ARMS)
    if unknown := [entry for entry in wanted if entry.partition(":")[0] not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    quiet()
    for entry in wanted:
        name, _, seed = entry.partition(":")
        if name in study.ARMS:
            study.main([entry])
        elif name == "trials":
            for trial in TRIALS:
                _report(partial(trial_stage, trial))
        elif name == "tests":
            for policy, frame in evaluation_stages().items():
                means = (f"{reward} {frame[f'reward_{reward}'].mean():+.2f}" for reward in REWARDS)
                print(f"[{policy}] on test prompts: {', '.join(means)}", flush=True)
        else:
            for one in [int(seed)] if seed else ARMS[name].seeds:
                _report(partial(policy_stage, name, one))


def _report(stage: Callable[[], Run]) -> None:
    """Train and say how it went; a policy that collapses is a result, and the others go on."""
    try:
        run = stage()
    except TrainingStopped as error:
        print(f"TrainingStopped: {error}", flush=True)
        return
    last = run.metrics().dropna(subset="eval_reward").iloc[-1]
    print(
        f"[{run.label}] on validation prompts: reward {last['eval_reward']:+.2f}, judge "
        f"{last['eval_judge']:+.2f}, KL {last['eval_kl']:.1f}, length "
        f"{last['eval_mean_length']:.0f}",
        flush=True,
    )


def _complete(trained: Iterable[tuple[str, int, str]]) -> Iterator[tuple[str, dict[int, str]]]:
    """Yield each arm of several seeds that are all trained, with their hashes by seed."""
    found = [*trained]
    for name, arm in ARMS.items():
        seeds = {seed: shaped_by for other, seed, shaped_by in found if other == name}
        if len(seeds) == len(arm.seeds) > 1:
            yield name, seeds


def _load_average(
    name: str, seeds: Iterable[int], scale: float
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the average of an arm's seeds."""
    policy, tokenizer = load_sft(base_profile())
    runs = [runs_dir(base_profile()) / policy_folder(name, seed) for seed in seeds]
    average_adapters(policy, runs, scale)
    return policy, tokenizer


if __name__ == "__main__":
    main()
