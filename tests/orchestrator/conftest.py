"""Its presence puts what tests share, `layouts`, within their reach."""
