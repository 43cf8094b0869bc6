"""The two products of packed masks with floats, and the arithmetic behind them."""
