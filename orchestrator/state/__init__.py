"""Who owns which shard of the state, and what has to move when that changes. `actors.state` carries it out.

May import: config, layout, model.
"""
