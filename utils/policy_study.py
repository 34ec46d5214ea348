"""The policies of the study: trials, training, and evaluation on the test prompts.

    python -m utils.policy_study                     # all that is missing
    python -m utils.policy_study scalar ordinal:1    # an arm with all its seeds, one of another
    python -m utils.policy_study trials              # the hyper-parameters, on validation prompts
    python -m utils.policy_study tests               # controls and what is trained, test prompts;
                                                     # averages of an arm's seeds, too

The reward models and the judge are the published ones. A policy lands in
runs/cpu/align_<arm>_s<seed>, its evaluation in runs/cpu/test_<arm>_s<seed>; what was stopped goes
on from its last checkpoint. `python -m utils.published` copies what is there into results/,
`make policies` does both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.alignment import Scale, align_policy
from utils.averaging import average_adapters
from utils.checkpoints import load_adapter
from utils.comparison import Comparison
from utils.config import Profile, config_hash
from utils.environment import quiet
from utils.evaluation import held_out_metrics
from utils.judge import Judge
from utils.pipeline import (
    SAMPLING_FIELDS,
    SFT_FIELDS,
    load_sft,
    open_stage,
    prepared_data,
    print_plan,
    reward_scale,
    runs_dir,
    sample_sft,
    stage_config,
    texts_of,
)
from utils.policy_arms import (
    ARMS,
    AVERAGE,
    AVERAGE_SCALES,
    TRIALS,
    PolicyArm,
    policy_profile,
    trial_profile,
)
from utils.profiles import with_fields
from utils.publish import read_record
from utils.published import load_published, published_sums
from utils.readouts import PolicyReward, rival_distributions
from utils.reinforce import TrainingStopped
from utils.results import ResultsError, Run, read_jsonl
from utils.rewards import RewardModel

POLICY_FIELDS = ("data", "model", "reinforce", "evaluation")
TEST_FIELDS = ("data", "model", "evaluation", *SAMPLING_FIELDS)
REWARDS = ("scalar", "ordinal", "judge")  # by which every policy is evaluated
# Noise of its own: neither the rivals of a policy nor the pool share a draw with an evaluation.
RIVALS: dict[str, Any] = {"evaluation.seed": 4321}
RIVAL_SAMPLES = 2
POOL: dict[str, Any] = {"evaluation.seed": 5432, "evaluation.samples_per_prompt": 16}


def policy_stage(name: str, seed: int) -> Run:
    """Train the policy of an arm with one seed, or find it done."""
    return _train(f"align_{name}_s{seed}", ARMS[name], policy_profile(name, seed))


def trial_stage(name: str) -> Run:
    """Train a policy with the settings of a trial and the scalar reward, or find it done."""
    return _train(f"trial_{name}", ARMS["scalar"], trial_profile(name))


def rivals_stage() -> Run:
    """Sample the SFT model on all training prompts: whom "beats_sft" has to beat."""
    profile = with_fields(_base(), RIVALS)
    return sample_sft("sft_rivals", profile, prompts=None, samples=RIVAL_SAMPLES)


def scale_stage(reward: str, readout: str = "mean") -> Scale:
    """Measure mean and standard deviation of a reward on SFT samples, or read what was measured.

    They are the unit of all arms and seeds, and a stage of its own, so that policies that are
    evaluated on other machines, with other rounding, share it.
    """
    profile, facts = _base(), _reward_facts(reward, readout)
    config = stage_config(profile, SFT_FIELDS, models=published_sums((reward,)), **facts)
    run, finished = open_stage(profile, f"scale_{reward}_{readout}", config)
    if not finished:
        scorer = _scorer(reward) if readout == "mean" else _training_reward(reward, readout)
        run.finish(scale=reward_scale(scorer, profile))
    mean, std = run.info["scale"]
    return mean, std


def average_stage(name: str, arm: str, seeds: Mapping[int, str]) -> Run:
    """Evaluate the average of an arm's seeds on the validation prompts by scale, or find it done.

    `run.json` then holds `scale`, the one with the highest reward within the KL budget.

    Args:
        name: of the stage.
        arm: whose seeds.
        seeds: which of them, trained, with the hash of their configuration.

    Raises:
        ResultsError: if every scale is beyond the budget.
    """
    profile, kind = _base(), ARMS[arm].reward
    models, facts = published_sums((kind, "judge")), _reward_facts(kind, "mean")
    facts |= {"average_of": [*seeds.values()], "scales": AVERAGE_SCALES}
    config = stage_config(profile, POLICY_FIELDS, models=models, **facts)
    run, finished = open_stage(profile, name, config)
    if not finished:
        (run.directory / "metrics.csv").unlink(missing_ok=True)  # of one that was stopped
        held_out = {"own": kind, "judge": "judge"}
        scorers = {role: _scorer(name) for role, name in held_out.items()}
        scales = {role: scale_stage(name) for role, name in held_out.items()}
        prompts = prepared_data(profile).prompts("validation")
        for scale in AVERAGE_SCALES:
            average = _load_average(arm, seeds, scale)
            metrics = held_out_metrics(*average, prompts, profile, scorers, scales)
            print(f"[{name}] scale {scale}: {metrics}", flush=True)
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
    profile = _base()
    reward_models = {name: _scorer(name) for name in REWARDS}
    facts = {"models": published_sums(REWARDS)}
    scales = {name: scale_stage(name) for name in REWARDS}
    comparison = Comparison(profile, reward_models, TEST_FIELDS, facts, scales)
    temperature = profile.reinforce.temperature
    frames = comparison.controls()
    # Its KL to the SFT model is zero, so the reference need not read it.
    frames["sft_pool"] = comparison.evaluate(
        "sft_pool", comparison.sft, temperature, reference=False, changes=POOL
    )
    trained = [*_trained()]
    for name, seed, shaped_by in trained:
        evaluate = partial(comparison.evaluate, load=partial(_load, name, seed), trained=shaped_by)
        policy = f"{name}_s{seed}"
        frames[policy] = evaluate(policy, temperature=temperature)
        if seed == 0:
            frames[f"{policy}_greedy"] = evaluate(f"{policy}_greedy", temperature=0.0)
    for name, seeds in _complete(trained):
        first = min(seeds)
        # What of the average's gain the scale alone would have brought.
        average_stage(f"scaled_{name}", name, {first: seeds[first]})
        scale = average_stage(f"average_{name}", name, seeds).info["scale"]
        load = partial(_load_average, name, seeds, scale)
        shaped_by = {"trained": [*seeds.values()], "scale": scale}
        policy = f"{name}_{AVERAGE}"
        frames[policy] = comparison.evaluate(policy, load, temperature, **shaped_by)
    return frames


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.policy_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stages", nargs="*", metavar="ARM[:SEED] | trials | tests", help="default: all"
    )
    stages = ("trials", *ARMS, "tests")
    wanted = parser.parse_args(arguments).stages or stages
    if unknown := [entry for entry in wanted if entry.partition(":")[0] not in stages]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(stages)}")
    quiet()
    for entry in wanted:
        name, _, seed = entry.partition(":")
        if name == "trials":
            for trial in TRIALS:
                _report(partial(trial_stage, trial))
        elif name == "tests":
            for policy, frame in evaluation_stages().items():
                means = (f"{reward} {frame[f'reward_{reward}'].mean():+.2f}" for reward in REWARDS)
                print(f"[test_{policy}] {', '.join(means)}", flush=True)
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
        f"[{run.directory.name}] on validation prompts: reward {last['eval_reward']:+.2f}, judge "
        f"{last['eval_judge']:+.2f}, KL {last['eval_kl']:.1f}, length "
        f"{last['eval_mean_length']:.0f}",
        flush=True,
    )


def _train(stage: str, arm: PolicyArm, profile: Profile) -> Run:
    run, finished = open_stage(profile, stage, _config(arm, profile))
    if not finished:
        own, judge = ((_scorer(name), scale_stage(name)) for name in (arm.reward, "judge"))
        training = _training_reward(arm.reward, arm.readout), scale_stage(arm.reward, arm.readout)
        policy, tokenizer = load_sft(profile)
        print_plan(profile)
        align_policy(
            *(policy, tokenizer, profile, prepared_data(profile), run),
            training,
            {"own": own, "judge": judge},
        )
    return run


def _config(arm: PolicyArm, profile: Profile) -> dict[str, Any]:
    models, facts = published_sums((arm.reward, "judge")), _reward_facts(arm.reward, arm.readout)
    return stage_config(profile, POLICY_FIELDS, models=models, **facts)


def _reward_facts(reward: str, readout: str) -> dict[str, Any]:
    """Return what shapes a reward, for a stage's configuration."""
    facts: dict[str, Any] = {"reward": reward, "readout": readout}
    if readout == "beats_sft":
        facts |= {"rivals": RIVALS, "rival_samples": RIVAL_SAMPLES}
    return facts


def _base() -> Profile:
    """Return the profile that all evaluations and units are of: the headline arm's, seed 0."""
    return policy_profile("scalar", 0)


@cache
def _scorer(name: str) -> RewardModel | Judge:
    return load_published(name)


@cache
def _training_reward(reward: str, readout: str) -> PolicyReward:
    reward_model = _scorer(reward)
    if readout != "beats_sft":
        return PolicyReward(reward_model, readout)
    rows = read_jsonl(rivals_stage().directory / "samples.jsonl")
    texts = texts_of(rows, prepared_data(_base()))
    return PolicyReward(reward_model, readout, rival_distributions(reward_model, *texts))


def _trained() -> Iterator[tuple[str, int, str]]:
    """Yield arm, seed and configuration hash of each finished policy with today's settings."""
    for name, arm in ARMS.items():
        for seed in arm.seeds:
            profile = policy_profile(name, seed)
            record = read_record(runs_dir(profile) / f"align_{name}_s{seed}" / "run.json")
            wanted = config_hash(_config(arm, profile))
            if record.get("status") == "finished" and record["config_hash"] == wanted:
                yield name, seed, wanted
            else:
                print(f"[align_{name}_s{seed}] is not trained yet, and not evaluated", flush=True)


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
    policy, tokenizer = load_sft(_base())
    runs = [runs_dir(_base()) / f"align_{name}_s{seed}" for seed in seeds]
    average_adapters(policy, runs, scale)
    return policy, tokenizer


def _load(name: str, seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained policy, rounded as it is published: what is published is what is tested."""
    profile = policy_profile(name, seed)
    policy, tokenizer = load_sft(profile)
    load_adapter(runs_dir(profile) / f"align_{name}_s{seed}", policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    return policy, tokenizer


if __name__ == "__main__":
    main()
