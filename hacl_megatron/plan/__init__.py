"""What a run will need before it is started: parameters, memory, communication, time; and which layouts would do.

    RunConfig, Layout ─┬─ assemble.parameters ─→ state (weights, gradients, optimiser: exact)
                       ├─ workload ────────────→ activations, image_parts (of the packed rows)
                       └─ platform.hardware ───→ compute (FLOPs, bytes sent, time: estimates)
                                    all together: planner ─→ vision_parallel, report, suggest

`dry_run` builds the real parts of a run of any size on meta tensors. Nothing here touches a device or starts processes.
"""
