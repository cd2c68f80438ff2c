"""The same tasks in every framework; each module is imported only in an environment that has the framework."""
