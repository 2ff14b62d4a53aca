"""Topics that a person has most likely not talked about: of those that were not talked about, negatives are made.

Everyday ones are written by hand, and behind each stand words that are near to it: who has said one of them may well
have talked about it, so the topic is left out then, too. The others are what texts and conversations are about
(tools/draw_topics.py). They look like what a conversation is found to be about: beside everyday ones alone, an adapter
learns to tell the two apart, and takes whatever is not everyday for discussed.
"""

from dataclasses import dataclass
from pathlib import Path

from molora_training.data.text import stable_fraction

HELD_OUT = 0.25  # of all: they are for tests, and nothing is trained on them
DRAWN = Path(__file__).with_name("topics.txt")  # a topic a line

_TOPICS = """\
baking bread: bread bake dough sourdough yeast loaf flour oven
brewing coffee: coffee espresso latte cappuccino cafe caffeine
green tea: tea teapot matcha
making cheese: cheese cheddar mozzarella dairy milk
grilling meat: grill barbecue steak meat beef
cooking pasta: pasta spaghetti noodle lasagne italian
sushi: sushi fish rice japanese
chocolate cake: chocolate cake dessert cocoa bake
growing tomatoes: tomato garden vegetable greenhouse plant
making jam: jam marmalade fruit berry strawberry
vegan recipes: vegan vegetarian recipe plant cook
ice cream: ice cream dessert
honey and bees: honey bee hive beekeeping
apple pie: apple pie bake
fermenting cabbage: ferment cabbage kimchi sauerkraut pickle
red wine: wine grape vineyard alcohol
brewing beer: beer brew hops alcohol pub
breakfast cereals: cereal breakfast oat porridge muesli
peanut allergies: allergy allergic peanut nut
losing weight: weight diet calorie slim fat
training for a marathon: marathon run race jog
swimming lessons: swim pool lesson
playing tennis: tennis racket wimbledon
football results: football soccer goal match league
basketball: basketball nba hoop
ice hockey: hockey puck skate ice
learning to ski: ski snow slope
surfing: surf wave beach board
rock climbing: climb boulder rock
yoga exercises: yoga stretch pose exercise
lifting weights: lift weight gym muscle barbell
riding a bicycle: bicycle bike cycle ride
golf clubs: golf club
boxing: box fight punch ring
judo: judo karate martial belt
fishing trips: fish trip angler lake boat
sailing boats: sail boat yacht sea
horse riding: horse ride pony saddle
chess openings: chess opening gambit pawn
card games: card game poker bridge
crossword puzzles: crossword puzzle sudoku
jigsaw puzzles: jigsaw puzzle
board games: board game dice monopoly
collecting stamps: stamp collect collection
collecting coins: coin collect collection
model railways: model railway train
knitting sweaters: knit sweater wool yarn crochet
sewing dresses: sew dress fabric needle tailor
pottery: pottery clay ceramic kiln
oil painting: paint painter canvas art
watercolours: watercolour watercolor paint art
drawing portraits: draw portrait sketch art
taking photographs: photograph photo photography camera picture
playing the guitar: guitar chord string music
piano lessons: piano lesson keyboard music
playing the violin: violin string orchestra music
singing in a choir: sing choir song voice music
drum kits: drum kit percussion music
jazz records: jazz record music saxophone
opera: opera aria music theatre
classical ballet: ballet dance classical
salsa dancing: salsa dance
horror films: horror film movie scary
romantic comedies: romantic comedy film movie romance
science fiction novels: fiction novel book space
detective stories: detective story crime mystery book
reading poetry: poetry poem poet verse
fairy tales: fairy tale story
comic books: comic book manga superhero
television series: television tv series show episode
podcasts: podcast radio listen
learning Spanish: spanish spain language
learning Japanese: japanese japan language kanji
sign language: sign language deaf
Latin grammar: latin grammar language
training a puppy: puppy dog pet train
cat food: cat kitten pet food
keeping goldfish: goldfish fish aquarium pet
parrots: parrot bird pet
hamsters: hamster rodent pet
watching birds: bird birdwatching owl
elephants: elephant ivory animal
whales and dolphins: whale dolphin sea animal
sharks: shark sea fish
dinosaurs: dinosaur fossil
spiders: spider web insect
snakes: snake reptile venom
butterflies: butterfly caterpillar insect
growing roses: rose garden flower plant
mowing the lawn: mow lawn grass garden
house plants: plant houseplant pot
bonsai trees: bonsai tree plant
compost heaps: compost garden soil
mushroom picking: mushroom fungus forest
camping in a tent: camp tent outdoor
hiking in the mountains: hike mountain walk trail
train journeys: train journey rail travel
cheap flights: flight fly airline airport plane travel
packing a suitcase: suitcase pack luggage travel
holidays in Italy: italy italian holiday rome travel
a trip to Egypt: egypt egyptian pyramid trip travel
visiting New Zealand: zealand visit travel
the city of Paris: paris france french city
Scottish castles: scottish scotland castle
cruise ships: cruise ship sea travel
renting a car: rent car hire drive travel
hotel reviews: hotel review travel
buying a used car: car buy drive vehicle dealer
electric cars: electric car battery charge vehicle
changing a flat tyre: tyre tire wheel car
motorcycles: motorcycle motorbike bike ride
driving tests: drive test licence license car
parking tickets: park ticket fine car
public buses: bus public transport
renting a flat: rent flat apartment landlord tenant
mortgages: mortgage loan bank house
moving house: move house removal
painting a wall: paint wall room
laying tiles: tile bathroom floor
leaking taps: leak tap pipe plumbing plumber
broken washing machines: wash washing machine laundry repair
cleaning windows: clean window
ironing shirts: iron shirt laundry
choosing a sofa: sofa couch furniture
wooden furniture: wood wooden furniture carpenter
curtains: curtain window
burglar alarms: burglar alarm theft security
solar panels: solar panel roof electricity sun
heating bills: heat bill energy gas
saving for retirement: retirement retire pension save
income tax: tax income
buying shares: share stock market invest
credit cards: credit card bank debt
travel insurance: insurance insure travel
writing a will: will testament inheritance lawyer
starting a company: company business start startup founder
job interviews: job interview career
asking for a pay rise: pay salary raise wage
office furniture: office furniture desk
team meetings: team meet meeting
public speaking: speech speak speaking public
e-mail newsletters: email mail newsletter
spreadsheets: spreadsheet excel table
slow computers: computer slow laptop
choosing a phone: phone smartphone mobile
wireless headphones: headphone wireless earphone bluetooth
video games: video game console play
printers: printer print ink
forgotten passwords: password forget login
social networks: social network facebook instagram
robot vacuum cleaners: robot vacuum clean
smart watches: watch smartwatch
virtual reality: virtual reality vr headset
flying drones: drone fly
telescopes: telescope star astronomy
the planet Mars: mars planet space
black holes: hole space astronomy
the Moon landing: moon landing apollo space
volcanoes: volcano lava erupt
earthquakes: earthquake seismic
weather forecasts: weather forecast rain storm
hurricanes: hurricane storm wind
glaciers: glacier ice
recycling plastic: recycle plastic waste
ancient Rome: rome roman ancient history
the Vikings: viking norse history
medieval knights: medieval knight history
the French Revolution: french france revolution history
the Olympic Games: olympic olympics game medal
general elections: election vote party politics
museums: museum exhibition gallery
cathedrals: cathedral church
wedding speeches: wedding speech marry marriage bride
birthday presents: birthday present gift
Christmas decorations: christmas decoration
children's parties: child children party
names for a baby: baby name child
bedtime routines: bedtime sleep routine child
homework: homework school teacher
university fees: university fee college student
learning to read: read reading school
toothache: tooth teeth toothache dentist dental
headaches: headache migraine pain
back pain: back pain spine
hay fever: hay fever pollen allergy
sleeping badly: sleep insomnia bed
giving up smoking: smoke smoking cigarette nicotine
vaccinations: vaccination vaccine jab
new glasses: glasses eye optician lens
hair colours: hair colour color hairdresser
skin cream: skin cream cosmetic
perfume: perfume scent fragrance
running shoes: shoe run sneaker
winter coats: coat winter jacket
tattoos: tattoo ink
astrology: astrology horoscope zodiac
magic tricks: magic trick
"""


@dataclass(frozen=True)
class Topic:
    """One of the bank, the words that stand for it and for what is near to it, and whether it is an everyday one."""

    name: str
    near: str
    everyday: bool

    @property
    def held_out(self) -> bool:
        """Whether it is for tests alone."""
        return stable_fraction(f"plum:{self.name}") < HELD_OUT


BANK: tuple[Topic, ...] = (
    *(Topic(name, f"{name} {near}", True) for name, near in (line.split(": ", 1) for line in _TOPICS.splitlines())),
    *(Topic(line, line, False) for line in DRAWN.read_text(encoding="utf-8").splitlines()),
)
