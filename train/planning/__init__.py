"""What a run will take, before it is queued: memory, time, and the layouts that fit."""
