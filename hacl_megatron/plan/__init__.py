"""What a run will need before it is started: parameters, memory, communication, time; and which layouts would do.

    RunConfig, ModelConfig, Layout ─┬─ parameters ─→ state (weights, gradients, optimiser: exact)
                                    ├─ workload ───→ activations (of the packed rows)
                                    └─ hardware ───→ compute (FLOPs, bytes sent, time: estimates)
                                              all together: planner ─→ report, suggest

Nothing here touches a device or starts a process.
"""
