"""With what a run goes on when its nodes have changed: layout, places of experts, and a replay of what was trained."""
