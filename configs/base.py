"""Every key with its default. A recipe imports this and assigns over it."""

import math

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.weights = (
        ""  # a folder, file or hub name of released weights, commas add; "": ours
    )
    c.tokenizers = ""  # a folder or hub name; "": the weights', CLIP's own, T5's hub
    c.model = dict(
        name="mmdit",  # dit, crossdit, uvit, unet
        depth=24,
        width=placeholder(int),  # 64 * depth, as in the paper, unless given
        num_heads=placeholder(int),  # depth, unless given
        patch=2,
        channels=16,
        mlp_ratio=4,
        qk_norm=True,
        dual_blocks=0,  # the first 13 in SD3.5-medium
        weight_sets=2,  # 3 keeps CLIP's and T5's tokens apart (paper 5.2.3)
        text_split=77,  # where the third weight set begins
        pos_size=192,  # side of the position table, in tokens
        pos_base=64,  # tokens that span the 16 units of the table's scale
        multipliers=(),  # of width, by level of a U-Net: (1, 2, 4, 4) in SD 2.1
        attended=(),  # its levels with transformers: (0, 1, 2) in SD 2.1
        pos_crop="center",  # random: anywhere on the table in training (SD3.5-medium)
        context_dim=4096,
        pooled_dim=2048,
        dtype="bfloat16",  # or float32; float16 is for sampling alone
        remat="full",
        unroll=1,  # blocks a turn of the scan; on a CPU all of them, which is faster
        attention="auto",  # by platform; xla, dot_product (cuDNN) or splash (TPU)
    )
    c.text = dict(
        name="precomputed",  # context and pooled come with the records
        length=154,
        dropout=0.464,  # each encoder by itself (paper 5.3.3, appendix B.3)
        width=128,  # the rest belongs to the trainable byte tower
        depth=2,
        num_heads=4,
        words=16,
    )
    c.image = dict(
        autoencoder="latents",
        height=256,
        width=256,
        buckets=1,  # shapes of about height * width pixels; more: for many aspects
        aspect=2.0,  # of the widest of them, and of the tallest
    )
    c.encode = dict(
        weights="",  # released ones, for pictures and captions that are not encoded
        tokenizers="",  # as config.tokenizers
        dtype="bfloat16",  # that the encoders compute in
        form="moments",  # of the latents, drawn anew at every step; or latents
        rows=8,  # examples a device at a time
        latents_dtype="float16",
        text_dtype="bfloat16",
    )
    c.flow = dict(
        path="rf",  # edm, eps/cos, v/cos, eps/linear, v/linear: what is regressed
        density="logit_normal",  # of t; uniform, mode, cosmap, linear
        mean=0.0,
        std=1.0,
        mode_scale=1.29,
        shift=1.0,
    )
    c.optim = dict(
        name="adamw",  # or of the others in docs/training.md
        lr=1e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-15,  # with qk-norm, what keeps bfloat16 stable (paper 5.3.2)
        mu_dtype="float32",  # of the first moment; or bfloat16
        weight_decay=0.0,  # of matrices and embeddings; no bias, scale or table
        clip=1.0,  # largest global norm of a gradient; 0 or inf: none
        schedule="constant",
        warmup=1_000,
        muon_lr=0.02,  # of the matrices that muon takes; the rest have lr
        accumulate=1,
    )
    c.ema = dict(  # paper, appendix B.3
        decay=0.99,
        every=100,  # steps; before the hundredth the average follows each
    )
    c.tune = dict(  # docs/finetuning.md
        base="",  # released weights, a run's workdir or RUN/checkpoints/STEP; "": none
        method="full",  # lora: only matrices of a low rank beside those of the base
        text=True,  # whether a tower of bytes trains as well, where all weights do
        lora="",  # a LoRA file to go on from, of tune.rank; "": a new one
        rank=16,
        alpha=0.0,  # of lora, whose update is times alpha / rank; 0: the rank
        targets="attn",  # a regex found in the path of what lora adapts; "": all linear
        objective="flow",  # or dpo, of records that are preferences
        beta=5_000.0,  # of dpo, for errors that are means over a latent's numbers
        weight="constant",  # of dpo over t; (1-t)^2 is that of errors in the noise
        prior=0.0,  # weight of the loss on the last of data.records (DreamBooth)
    )
    c.mesh = dict(data=1, fsdp=-1, context=1, tensor=1)  # -1: what is left
    c.data = dict(
        name="synthetic",
        batch_size=1024,
        threads=4,
        prefetch=8,
        mix=(0.2, 0.5, 0.3),  # of single digits, pairs and numbers in "digits"
        easy=0,  # its first examples tell pairs from left to right, top to bottom
        records=(),  # for "records": shards, or globs of them (sd3_jax/data/records.py)
        weights=(),  # how often each of these is drawn from; (): all are one set
        held_out=(),  # shards for validation only, or globs of them
        bad_records=0.0,  # the share of records that may be bad, and are passed over
    )
    c.ingest = dict(
        inputs=(),  # folders of pictures, WebDataset tars, parquet files, or globs
        captions=("caption=0.5", "synthetic=0.5"),  # columns or package.module:function
        filters=(),  # "aesthetic>=4.5", "width>=512", "package.module:function<0.2"
        exclude=(),  # what dedup found: its duplicates.jsonl
        prefix="",  # before each caption; of a picture without one, its caption
        uncaptioned="reject",  # pictures without text; keep: as unconditional examples
        rejected="",  # the column that names the other, worse picture of a preference
    )
    c.precompute = dict(
        only=("vae", "clip_l", "clip_g", "t5"),  # of encode.weights; (): pictures
        part=4_096,  # pictures, about, that are done at once or again
        threads=4,  # that read and decode
        held_out=0.0,  # share of the records that is for validation
        plan=0,  # say what so many pictures would take, and read none
    )
    c.dedup = dict(
        embed="hash",  # or an SSCD TorchScript file, or package.module:function
        threshold=0.0,  # of similarity; 0: the embedding's own
        clusters=0,  # 0: by the number of pictures
        probes=4,  # clusters that are searched for each
        batch_size=64,
        threads=4,
        pairs=64,  # on the report
    )
    c.inspect = dict(
        records=16,  # of each shard that are read; 0: all
        pictures=48,  # on the contact sheet
        shards=False,  # a row for each, however many
    )
    c.train = dict(
        steps=500_000,  # where a decay of the rate ends
        log_every=50,
        eval_every=5_000,
        sample_every=5_000,
        prompts=(),  # painted at every sample_every, and by sample without a prompt
        skip_nonfinite=0,  # steps without an update that a run may have; then it stops
        stuck_after=900.0,  # seconds for a step or a save; then the run is ended
        writers=(),  # wandb, mlflow: services that get the metrics too
        changes=(),  # keys in which a run may differ from what it was so far
    )
    c.checkpoint = dict(every=1_000, keep=3, keep_every=50_000)
    c.profile = dict(
        start=0,  # the first step of an xprof trace in workdir/profile; 0: no trace
        steps=3,
    )
    c.sample = dict(
        prompt="",
        prompts_file="",
        negative="",
        steps=28,
        solver="",  # of solver, grid and shift what is left open is as the released
        grid="",  # weights' own scheduler has it, or for ours euler, released and 3.0
        shift=0.0,  # 0: left open
        cfg=5.0,  # 1 or less: no guidance, one pass of the network a step
        cfg_start=0.0,  # guidance acts for t in [cfg_start, cfg_stop]
        cfg_stop=1.0,
        rescale=0.0,
        seed=0,
        per_prompt=1,
        batch_size=64,
        weights="ema",
        step=0,  # a checkpoint's; 0: the newest. Also of evaluate, convert; not train
        lora=(),  # LoRA files for released weights: "path", or with a weight "path=0.8"
        filter="",  # package.module:function that flags pictures (docs/sampling.md)
        watermark="",  # a text of at most 16 bytes, marked in all pictures
        max_length=256,  # T5's tokens; these and what follows are for released weights
        clip_skip=0,
        skip_layers=(),  # skip-layer guidance; 7, 8, 9 for SD3.5-medium
        skip_scale=2.8,
        skip_start=0.01,
        skip_stop=0.2,
    )
    c.quantize = dict(  # int8 or fp8 for the matrices of the blocks, in inference
        denoiser="",  # of released weights, or of a trained run
        t5="",  # wherever released text encoders are
    )
    c.convert = dict(
        to="diffusers",  # or "original", a single file, or "orbax", our own
        out="",  # a new path; "": in workdir
        dtype="",  # float32, float16 or bfloat16; "": every tensor as it was
    )
    c.plan = dict(
        slices=("v5e-256",),  # v5p-128, v6e-256, tpu7x-128, …; 2xv5e-256 are two
        job="train",  # or sample: text encoders, denoising, decoding
        per_chip=0,  # images; 0: as data.batch_size or sample.batch_size says
        search=True,  # without per_chip: over mesh, images a chip and remat
        tries=4,  # programs that a search compiles for a slice, at most
        flags="launch/flags",  # the compiler's, by generation; "": its defaults
        hlo=False,  # keep the compiled programs' text
    )
    c.compare = dict(
        prompts=("a red fox in the rain", "Foxes, 3 of them!", ""),
        tolerance=1e-4,  # of a standard deviation, for any layer in float32
        bfloat16=2.0,  # times PyTorch's own error
    )
    c.benchmark = dict(  # docs/speed.md
        cases=(),  # "train side=256 batch=4": a kind, and what is not as below
        against=("eager",),  # PyTorch; or compile, or both
        dtype="float32",
        repeats=7,  # turns of each side, one after the other
        warmup=2,
        pause=0.3,  # seconds before a turn, in which the other's threads fall asleep
        apart=(),  # kinds whose sides do not fit the memory beside each other
        matmul=2048,  # side of the square whose product gives the machine's peak
        vae=dict(channels=(128, 256, 512, 512), layers=2),
        t5=dict(
            depth=8, width=512, num_heads=8, mlp=1024, vocab=32_128, length=77, batch=4
        ),
        clip=dict(
            depth=12,
            width=768,
            num_heads=12,
            mlp=3072,
            vocab=49_408,
            length=77,
            batch=4,
        ),
        scaling=dict(  # ours alone, one picture's size or the depth growing
            kinds=("forward",),
            tokens=(256, 512, 1024, 2048, 4096),
            depths=(4, 8, 16, 24),  # with the first of the tokens
            width=512,
            num_heads=8,
            depth=4,  # with all of the tokens
            batch=4,
            unroll=1,  # what keeps a deep model's program short
            repeats=5,
        ),
        startup=3,  # times that imports and first steps are timed; 0: none
        guard="",  # a benchmark.json from before; exit code 1 where a ratio is worse
        worse=0.15,  # by more than this share
    )
    c.study = dict(
        variants=(),  # "NAME: KEY=VALUE KEY=VALUE", each a form of the recipe
        sweep=(),  # "KEY=VALUE …", tried for each with one seed; the best is kept
        by="loss",  # in validation, or score or fid: the sweep's measure
        seeds=3,
        settings=(  # of config.sample, by which pictures are made (paper, B.3)
            *("steps=50 cfg=1", "steps=50 cfg=2.5", "steps=50 cfg=5"),
            *("steps=5 cfg=5", "steps=10 cfg=5", "steps=25 cfg=5"),
        ),
        weights=("ema", "params"),
        pictures=1_000,  # of each setting
    )
    c.eval = dict(
        examples=1_024,  # held out, for the validation loss
        batch_size=0,  # of validation; 0: data.batch_size
        scores=("val_loss",),
        pictures=240,  # of each kind and split, for "digits"
        split="test",  # prompts to report; choose settings by those of "tune"
        few_steps=5,
        prompts_file="",  # of captions, one a line; "": the held-out examples' own
        clip="",  # CLIP's folder, file or hub name: openai/clip-vit-large-patch14
        features="clip",  # pixels, package.module:function, or Inception's *.pt
        real=(),  # folders of pictures, tars, parquet, or one .npz; (): held-out ones
        statistics="",  # an .npz in which those of the real pictures are kept
        rows=8,  # pictures a device at a time, through CLIP
        per_prompt=4,  # pictures, for the benchmarks of prompts that follow
        geneval="",  # its evaluation_metadata.jsonl
        detector="",  # package.module:function; so are these (docs/measures.md)
        colour="",
        typography="",  # prompts with their text in quotes, one a line, or .jsonl
        ocr="",
        ocr_ignore=("space",),  # and case, punctuation: what is no error
        compbench="",  # T2I-CompBench's folder of prompts
        compbench_scorers=(),  # "color=package.module:function", …
    )
    return c.lock()


PRETRAINING = ("tiny", "256", "512", "1024")


def pretraining(c: ConfigDict, variant: str) -> ConfigDict:
    """What the paper's sizes share: rate, batch, and a variant's pixels a side."""
    c.optim.update(lr=1e-4, warmup=1_000)
    c.data.batch_size = 4096
    c.model.remat = "attention"  # what benchmarks/plan.md has room for
    resolution(c, 256 if variant in ("", "tiny") else int(variant))
    if variant == "tiny":
        shrink(c)
    return c


def resolution(c: ConfigDict, side: int) -> None:
    """Images of about `side`^2 pixels, whose sides span 16 units of the position table.

    So a table is interpolated from one resolution to the next and extended at its rim
    (sec. 5.3.2). Times are shifted by 3 at 1024; the paper gives no other shift, and
    sqrt(3) at 512 is what lies half way from 1 at 256.
    """
    c.image.update(height=side, width=side)
    c.model.pos_base = side // 16
    c.flow.shift = 3.0 ** (math.log2(side / 256) / 2)


def shrink(c: ConfigDict) -> None:
    """Any recipe in half a minute on a laptop: the same code, the smallest shapes."""
    c.model.update(depth=2, width=32, num_heads=2, dual_blocks=0, dtype="float32")
    c.model.update(context_dim=64, pooled_dim=32, pos_size=16, text_split=5)
    c.model.pos_base = min(c.model.pos_base, 4)
    c.model.update(unroll=1, remat="none")
    c.image.update(height=min(c.image.height, 64), width=min(c.image.width, 64))
    c.text.update(length=min(c.text.length, 24), width=32, num_heads=2, depth=1)
    c.data.batch_size = 8
    c.optim.warmup = 2
    c.train.update(steps=10, log_every=1, eval_every=5, sample_every=5)
    c.checkpoint.every = 5
    c.ema.every = 1  # which is the same, in a run of so few steps
    c.sample.update(steps=4)
    c.eval.examples = 16
