"""Scripts that measure speed; results/ holds their results, each with the machine named."""
