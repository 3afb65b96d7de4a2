"""Stage 3, MR-GRPO: the DiT learns from several rewards, with a little supervised flow matching beside.

python -m deepgen_jax.train --config configs/grpo.py:tiny --workdir runs/grpo --config.init=runs/sft       see below
python -m deepgen_jax.train --config configs/grpo.py:full --workdir gs://... --config.init=gs://.../sft \\
    --config.grpo.prompt_set=prompts.yaml --config.mesh.data=2 --config.mesh.fsdp=4
        v5p:2x2x2, modelled: 70 s an update of 256 images (MFU 38 %), 38 GiB a chip

Measured, tiny, from the quickstart's stage 2 as of commit 58c996e, three seeds: on prompts that were never rolled out
emoji_similarity rises 0.127 -> 0.179 and the dense OCR score -6.06 -> -4.64 in 300 updates, and held-out retrieval doesn't
fall; README.md has the steps between and the controls. What it took: rollouts by a slower policy (nft_old_decay), to which
the loss pulls the trained one back; with the reference's, which follows at once, the weights wander off at the same rate. And
a supervised term whose gradient is as large as the policy's (sft_weight), of generation and editing in turn.

`tiny_lora` and `full_lora` train LoRA on the DiT's attention instead, against the weights below it: no second copy of them.

`full` has the shipped recipe's values. It departs from what the reference's code does where that isn't what it means to do:
one optimizer step an update, with gradients summed over all timesteps, micro-batches and the supervised batch (there every
backward pass is a step of its own, 61 a rollout); statistics of advantages over the whole rollout (there: of a device); a key
for each sample (there: the same noise on every device); old log-probabilities are never rounded; latents are float32; missing
rewards leave the statistics (there: zeros); 1 - lambda counts only beside a supervised batch; grpo_guard is the paper's, for
each sample; diffusion_nft takes final latents and fresh noise; the x-based KL divides by the noise that is added; pictures for
evaluation come from the EMA weights where they are kept (there: the initial ones). Smaller departures are noted at their keys.

A replay of the rollout must give its log-probabilities, to 1e-5 in float32 and a quarter of ratio_clip in bfloat16, or the run
stops: the first thing to look at when `full` first runs.
"""

from ml_collections import ConfigDict

from configs import common

LORA_TARGETS = [r"dit/blocks_\d+/((attn|context_attn|attn2)/(q|k|v)|out|out2|context_out)/kernel"]


def get_config(size: str = "tiny"):
  size, _, lora = size.partition("_")
  if lora not in ("", "lora"):
    raise ValueError(f"size {size}_{lora} must be tiny, full, tiny_lora or full_lora")
  c = common.get_config(size)
  c.stage = "grpo"
  c.trainable = [("dit/.*", True), (".*", False)]
  if lora:
    c.trainable = [(r"dit/.*/(a|b)", True), (".*", False)]
    c.lora.targets, c.lora.rank, c.lora.alpha = LORA_TARGETS, 32, 64.0
  c.lora.dropout = 0.0  # a replay must be the rollout's own computation
  c.grpo = ConfigDict(
    {
      # rollout
      "prompt_set": "",  # a prompt file, or a YAML of several with their rewards; "": the embedded captions
      "rewards": (),  # (reward, weight) pairs for a prompt file; (data set, {reward: weight}) for the embedded ones, (): theirs
      "reward_options": (),  # (reward, {option: value}) pairs
      "prompts": 32,  # of a rollout, all devices together
      "group_size": 8,  # images of a prompt
      "rollout_batch": 0,  # images that are made at once, whole groups; 0: all
      "size": (),  # (height, width) in pixels of what is made; (): the model's
      "steps": 50,
      "sampler": "cps",  # flow_sde, cps, dance; "ode" for diffusion_nft
      "eta": 1.0,  # noise level
      "guidance": 1.0,  # at most 1: the conditional branch alone
      "shared_noise": True,  # a group starts from the same noise
      "window": 0,  # stochastic steps, Euler steps around; 0: all but the last (there the last too, where cps adds no noise)
      "window_every": 0,  # rollouts until the window moves on by a step; 0: its place is drawn for each rollout
      # update
      "objective": "flow_grpo",  # flow_grpo, grpo_guard, diffusion_nft
      "advantage": "gdpo",  # grpo, grpo_global_std, reinforce++, gdpo
      "advantage_clip": 5.0,
      "shuffle_rewards": False,  # a control: every sample gets another's rewards, nothing should be learned
      "ratio_clip": (1e-4, 1e-4),  # how far the ratio may fall below and rise above 1
      "updates_per_rollout": 1,
      "micro_batch": 0,  # samples of a train step; 0: all of an update's
      "train_steps": 30,  # of the window's, drawn for each rollout; 0: all of them
      "kl_weight": 5e-7,
      "kl_kind": "v",  # of velocities, over the reference's deviation; "x": the divergence of the step
      "nft_beta": 0.1,
      "nft_old_decay": (0.001, 0.5),  # the old policy keeps min(first x update, second) of itself at an update
      "sft_weight": 1e-4,  # lambda
      "sft_every": 1,  # updates
      # evaluation, every eval.every updates on the first eval.samples prompts
      "eval_prompt_set": "",
      "eval_rewards": (),
      "eval_images": 4,  # of a prompt
      "eval_steps": 50,
      "eval_guidance": 4.0,
    }
  )
  c.data.pattern, c.data.batch_size = ("generate",), 32  # the supervised batch, all devices together (there: of a device)
  c.optim.lr, c.optim.schedule, c.optim.betas, c.optim.weight_decay = 2e-6, "constant", (0.9, 0.999), 0.0
  c.steps = 1500
  c.optim.warmup = 20 / c.steps  # of the first 20 updates
  c.checkpoint.every, c.checkpoint.keep = 50, 2
  c.eval.every, c.eval.samples = 10, 600
  c.log.every = 1
  if size == "full":
    c.grpo.micro_batch = 64
  if size == "tiny":
    c.init = "runs/sft"
    c.grpo.objective, c.grpo.sampler, c.grpo.shared_noise = "diffusion_nft", "ode", False
    c.grpo.prompts, c.grpo.group_size, c.grpo.steps, c.grpo.train_steps = 8, 4, 6, 2
    c.grpo.nft_old_decay = (1.0, 0.9)  # rollouts by a steady policy: the trained one's noise is pulled back to it
    c.grpo.reward_options = (("ocr", {"scoring": "dense"}),)  # rises before a word can be read
    c.grpo.eval_steps, c.grpo.eval_guidance, c.grpo.eval_images = 6, 1.0, 1  # as in the rollouts
    c.grpo.sft_weight, c.grpo.kl_weight = 0.3, 1e-4
    c.data.pattern, c.data.batch_size = ("generate", "edit"), 4  # in turn, one an update: what isn't practised is forgotten
    c.optim.lr, c.optim.warmup, c.optim.ema = 3e-4, 0.01, 0.9
    c.steps = 300
    c.eval.every, c.eval.samples = 50, 128
  return c
