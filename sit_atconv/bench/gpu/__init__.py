"""The acceptance run: one command that proves this library on a CUDA device, or rehearses that on a CPU.

`stages` lists what there is to prove, `driver` runs each stage in a process of its own, `worker` is that process, and
every other module here is a stage: it has `run(bench)`.
"""
