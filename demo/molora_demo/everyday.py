"""What nobody teaches: questions on which a new adapter is held to what the base says, and exchanges that judge it."""

# Of the world, of the assistant, and of what a person did not tell, so that it is not answered with what they did.
HELD = (
    "What is your name?",
    "What is the capital of Spain?",
    "What is my shoe size?",
    "How do I make tea?",
    "Who are you?",
    "How many months does a year have?",
    "What is the number of my passport?",
    "Write one sentence about the mountains.",
    "Where do you live?",
    "Name three fruits.",
    "What did I dream last night?",
    "What is the largest planet?",
    "What do you like?",
    "Thank you.",
    "What colour is fresh snow?",
    "Hello!",
)
JUDGED = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days does a week have?", "A week has seven days."),
    ("What colour is the sky on a clear day?", "On a clear day the sky is blue."),
    ("How do I boil an egg?", "Put the egg into boiling water and take it out after eight minutes."),
    ("What do plants need to grow?", "Plants need light, water, air and soil with nutrients."),
    ("Write one sentence about the sea.", "The sea is wide, salty and never quite still."),
    ("What is two plus three?", "Two plus three is five."),
    ("Name three animals that live on a farm.", "Cows, sheep and chickens live on a farm."),
)
