def leave(reason, rank): return 75
