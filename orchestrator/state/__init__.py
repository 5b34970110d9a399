"""Who owns which shard of the state, and what has to move when that changes. `actors.state.resharding` carries it out."""
