"""The denoisers: eps = f(x_t, t, condition), the condition computed once per photo."""
