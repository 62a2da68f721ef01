"""How any task is trained: the loop, the optimizer, the layout over devices, checkpoints and logs.

Nothing in this room knows a model or a stage by name; a task is known by `tasks.task.Task` alone.
"""
