"""An adapter that learns from many people's conversations, none of which leaves the machine that it is on."""
