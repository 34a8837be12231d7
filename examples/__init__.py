"""Recipes, demo and deployment; a package so that the benchmarks can use what the recipes do."""
