"""Pipeline schedules: `kinds` make them, `ir` is what they are made of and checked by, `timing` says how long they take, `search`
finds better ones, `pictures` draws them.

May import: no other room.
"""
