"""The public Python API, which `import capfilt` offers: the verbs as functions, loaded models, readers.

The command line calls the same functions. What is heavy (torch, pyarrow, Ray) is imported inside of them.

What most functions take:

    address: None (this process, or the caller's Ray), "local", "start", "auto", "HOST:PORT", "ray://HOST:PORT"; some
        also "by-size": this process for small work, else "start".
    workers: how many work side by side, 0 for as many as fit; `cpus` and `gpus` are of each of them, by default 1 and,
        where the cluster has any, 1.
    limit: seconds that a shard may take, 0 for any.
    retry: "failed" does the shards again in which samples or captions failed.
    min_success: the share of samples that must succeed, else ShortfallError is raised, with the result in `.result`.
    fork: a new run begins there and takes over from `out` what still holds.
    price: USD of a GPU-hour and of a CPU-hour, "gpu=3.0,cpu=0.05" or a mapping: `record["cost"]` says what it cost.
    on_progress: called with a `ProgressEvent` at each step; or a `Progress`, the console of the command line.
    on_log: called with each line that the command line prints between stages.
"""
