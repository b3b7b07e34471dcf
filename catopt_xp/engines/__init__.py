"""The ways to run an epoch of mini-batch steps. `plain` is the definition, the others are faster.

An engine is built for one run, on one device, and makes the steps of an epoch one after the other:

    engine, why = choose_engine("auto", model, optimizer, samples, targets, backend, settings)
    for done in engine.steps(epoch, order, first, following): ...   # done: batches finished so far in this epoch
    losses = engine.fetch_losses()
    engine.settle()   # before anyone looks at the model or the optimizer
"""
