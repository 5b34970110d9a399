"""What a run tells: a class for each kind of event (`kinds`), as lines of `events.jsonl` (`lines`), and the table in which whoever
listens says what it does with each kind (`consumers`).

May import: no other room.
"""
