"""
The built-in corpus: stories from a small grammar. Their probability, and so their entropy, is known.
"""

import math
import random

GIRLS = 'Lily Mia Anna Zoe Rose Ella Nora Ruby Clara Alma'.split()
BOYS = 'Tom Ben Max Sam Leo Finn Jack Hugo Oscar Theo'.split()
CHILDREN = [dict(child=name, kind='girl', he='She', his='her') for name in GIRLS]
CHILDREN += [dict(child=name, kind='boy', he='He', his='his') for name in BOYS]
FRIENDS = ('Pip Momo Bella Coco Dot Fuzzy Gus Hazel Jojo Kiki '
           'Luna Nutmeg Olive Poppy Rusty Tilly').split()
ANIMALS = 'rabbit fox duck bear mouse frog turtle squirrel hedgehog cat puppy goat'.split()
THINGS = 'ball kite hat drum boat lantern blanket bell cup basket ring book whistle scarf'.split()
PLACES = 'river forest hill meadow mill lake orchard beach market bridge'.split()
WORDS = dict(  # drawn anew for each line
    trait='little kind brave shy clever cheerful quiet funny',
    sky='sunny windy cloudy foggy warm cold',
    food='bread soup cake cheese honey nuts berries plums',
    when='morning afternoon evening',
    spot='stone tree wall log bush bench',
    strong='strong sudden warm',
    count='two three four five',
    part='knee hand foot nose',
    size='big small round tall',
    stuff='sand sticks snow mud',
    feeling='sad tired angry bored')
WORDS = {slot: words.split() for slot, words in WORDS.items()}
EVENTS = [  # what can happen to the child, the pal and the thing; `tell` fills the {}
    '{pal} was hungry, so {child} put down the {thing} and gave {pal} some {food}.',
    'Suddenly it began to rain. '
    '{child} hid the {thing} under a {spot}, and {pal} sang about the {thing}.',
    'A {strong} wind took the {thing} over the {place}. '
    '{pal} jumped {count} times and caught the {thing} for {child}.',
    '{child} fell and hurt {his} {part}. '
    '{pal} put some {food} on the {part} and told a joke about the {thing}.',
    'They built a {size} castle of {stuff} for the {thing}. '
    '"I like to play with {stuff}," said {pal}.',
    'They raced to the {place} and back. {winner} won the {thing}, and {pal} laughed.',
    '{child} lost the {thing} near a {spot}. '
    '{pal} looked for it for {count} hours, and the {thing} was found.',
    '{pal} was {feeling}. "Take my {thing}," said {child}, and soon {pal} was happy.']


def tell(rng):
    """(story, -ln of its probability). The text shows all choices, so its probability is their product."""
    counts = []  # of the options of each choice

    def pick(options):
        counts.append(len(options))
        return rng.choice(options)

    child = pick(CHILDREN)
    friend = pick(FRIENDS)
    kept = child | dict(pal=f'{friend} the {pick(ANIMALS)}', thing=pick(THINGS), place=pick(PLACES))
    drawn = WORDS | dict(winner=[child['child'], friend])

    def say(line):
        words = {slot: pick(options) for slot, options in drawn.items() if '{' + slot + '}' in line}
        return line.format(**kept, **words)

    events = [say(pick(EVENTS)) for _ in range(pick([3, 4, 5]))]
    opening = say('Once upon a time there was a {trait} {kind} named {child}. '
                  '{he} had a friend, {pal}, and a {thing}.')
    outing = say('One {sky} {when}, {child} and {pal} took the {thing} to the {place}.')
    ending = say('Then {child} and {pal} walked home from the {place} with the {thing}. '
                 'The {thing} had been to the {place}, and {child} and {pal} were happy.')
    return '\n\n'.join((opening, ' '.join((outing, *events)), ending)), sum(map(math.log, counts))


def builtin_stories(megabytes, seed):
    """Yield (story, -ln of its probability) until the stories have this many megabytes."""
    rng = random.Random(seed)
    size = 0
    while size < megabytes * 1e6:
        story, nats = tell(rng)
        size += len(story)
        yield story, nats
