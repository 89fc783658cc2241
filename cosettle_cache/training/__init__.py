"""From a store to a head: the loss, the samples it is computed on, the learner, and the closed form."""
