"""The demo model's vocabulary: names, things, and function words. Data only; a change needs a new training run."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# 300 first names: the keys of the recall task.
NAMES = _words(
    """
    Aaron Abel Abigail Ada Adam Adele Adrian Agnes Aidan Alan Albert Alec Alice Alina Alma Alvin Amara Amber
    Amos Amy Andrea Andrew Angela Anita Anna Anton Arlo Arthur Asher Astrid Audrey Aurora Austin Ava Axel
    Barbara Basil Beatrice Becky Bella Benjamin Bernard Bertha Beth Bianca Blake Boris Bram Brenda Brian Bridget
    Bruno Calvin Camilla Carl Carmen Caroline Casper Cecilia Cedric Celia Charles Charlotte Chloe Chris Clara
    Claude Clive Colin Conrad Cora Craig Curtis Cynthia Daisy Damian Daniel Daphne David Dean Deborah Denise
    Derek Diana Diego Dominic Donald Dora Doris Dorothy Douglas Duncan Dylan Edgar Edith Edward Edwin Eileen
    Elaine Eleanor Elena Elias Eliza Ella Elliot Elsa Emil Emily Emma Enid Eric Ernest Esther Ethan Eugene Eva
    Evan Evelyn Felix Fergus Fiona Flora Florence Frances Frank Freya Frida Gabriel Gareth Gary Gavin George
    Gerald Gilbert Gina Giles Gloria Gordon Grace Graham Greta Gustav Guy Hannah Harold Harriet Harry Hazel
    Hector Heidi Helen Henry Herbert Herman Hilda Holly Howard Hugo Ian Ida Igor Imogen Ingrid Irene Iris Isaac
    Isabel Ivan Ivy Jack Jacob James Jane Janet Jasmine Jason Jean Jeffrey Jenny Jeremy Jerome Jesse Jill Joan
    Joel John Jonas Jordan Joseph Joyce Judith Julia Julian Juno Karen Karl Kate Keith Kenneth Kevin Kira Klaus
    Kurt Lars Laura Lawrence Leah Leila Lena Leo Leonard Leslie Lewis Liam Lila Linda Lionel Lorna Louis Lucas
    Lucy Luna Luther Lydia Mabel Magnus Malcolm Marcus Margaret Maria Marion Martha Martin Marvin Mary Matilda
    Matthew Maurice Megan Melvin Mercy Milo Mira Miriam Molly Monica Morris Muriel Nadia Nancy Naomi Natalie
    Nathan Neil Nelson Nicholas Nigel Nina Noah Nora Norman Olga Olive Oliver Olivia Oscar Otto Owen Pamela
    Patrick Paula Pauline Peter Petra Philip Phoebe Priya Quentin Rachel Ralph Ramona Raymond Rebecca Regina
    Rita Robert Robin Roger Roland Ronald Rosa Rosalind Rowan Roy Rufus Rupert Ruth Sabina Sally Samuel
    """
)

# 300 things: the values of the recall task.
THINGS = _words(
    """
    acorns almonds amber anchors ants apples apricots archery arrows asters badgers bagels baking ballet
    balloons bamboo bananas banjos barley baskets bats beans bears beavers beds beer bees beetles bells berries
    bicycles birch birds biscuits boats books boots bottles boxing bread bricks bridges bronze brooms brushes
    bubbles butter buttons cabbage cacti cakes camels camping candles canoes caramel cards carpets carrots
    castles cats caves cedar cellos chains chairs chalk cheese cherries chess chicken chimneys cider cinema
    circles clay clocks clouds clover coal cobalt cocoa coconuts coffee coins comets comics cookies copper coral
    corn cotton cows crabs cranes crayons cream crickets crowns crystals cubes cups curry daisies dancing dates
    deer deserts diamonds dice dogs dolls dolphins donkeys doors dragons drums ducks dunes eagles eels eggs
    elephants elms emeralds engines falcons fans feathers fennel ferns ferries fiddles figs fire fishing flags
    flint flowers flutes foals fog forests fossils foxes frogs frost fudge galaxies gardens garlic geese gems
    geysers giants ginger giraffes glaciers glass gliders gloves glue goats gold golf granite grapes grass
    gravel guitars hammers harbors harps hats hawks hay hedges hens herbs herons hills hockey honey horns horses
    ice ink iron islands ivory jade jam jars jasper jazz jelly jewels jokes juice jungles kayaks kettles keys
    kites kiwis knights knots koalas lace ladders lakes lamps lanterns larks lava lavender leather lemons
    lentils lilac lilies linen lions lizards llamas lobsters locks lutes magic magnets mangoes maps maple marble
    masks meadows melons mercury meteors mice milk mills mint mirrors mist monkeys moons moss moths mountains
    muffins mules music mustard nectar needles nets nickel nutmeg nuts oaks oars oats oceans olives onions opals
    opera orchids organs otters owls oysters paint palms pancakes pandas paper parks parrots pasta peaches
    pearls pears pebbles pencils pepper pianos pickles pies pigs pilots pine pizza planets plums poems ponds
    ponies poppies
    """
)

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NUMBERS = tuple(str(n) for n in range(200))

# Words of the prompt templates: those that may begin a text (no space before them) and those inside it.
OPENERS = _words("Facts Question Repeat Count Days Months Alphabet You Answer")
FRAME = _words(
    "Facts Question Answer Again From what does do like likes from to are a helpful assistant the facts briefly Go on"
)
