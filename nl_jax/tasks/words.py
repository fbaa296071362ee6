"""Words of which keys are made: adjective-noun, some 50,000 pairs.

Ours; the reference takes the lists of the package wonderwords, 912 adjectives
and 6782 nouns, so that figures made with these are not comparable to it.
"""

ADJECTIVES = tuple(
  """
  able absent acid active actual afraid aged agile alert alive amber ample
  ancient angry animal anxious arctic arid atomic austere autumn aware awful
  azure bald basic beige bitter black bland blind blond blue bold bony brave
  brief bright brisk broad broken bronze brown bumpy busy calm careful casual
  central certain cheap chief chilly civil classic clean clear clever close
  cloudy clumsy coarse coastal cold common cool copper coral cosmic costly
  crazy crimson crisp cruel curious curly damp daring dark dear deep dense
  distant dizzy double dry dull dusty eager early earnest eastern easy elastic
  elder empty endless equal exact exotic extra faint fair famous fancy fast
  fatal feeble fertile final firm fiscal flat fluffy formal fragile frank free
  fresh frosty frozen full funny furry gentle giant glad global glossy golden
  good grand grave gray great greedy green grim gross guilty hairy handy happy
  hard harsh hasty heavy hidden high hollow holy honest huge humble hungry icy
  ideal idle inner intense ivory jolly juicy junior keen kind large late lazy
  lean legal light linear liquid little lively local lonely long loose loud
  loyal lucky lunar mad magic main major mature medium mellow mild minor misty
  mobile modern modest moist moral muddy mutual narrow native neat nervous new
  nimble noble noisy normal northern novel obvious odd old olive open orange
  oval pale patient perfect plain polite poor precise pretty prime private
  proper proud public pure purple quick quiet rapid rare raw ready recent red
  """.split()
)
NOUNS = tuple(
  """
  acorn actor airport album alley almond anchor angle ankle answer apple apron
  arch arena armor arrow artist attic author avenue badge bakery balcony ball
  banana banjo barn barrel basin basket battery beach beard beaver bell bench
  berry bicycle bird blanket boat bottle bowl branch brass bread brick bridge
  brook brush bucket button cabin cactus camel camera candle canoe canvas canyon
  captain carpet carrot castle cellar chain chair chalk cherry chess chimney
  church circle city cliff clock cloud clover coach coat coffee comet compass
  copy corner cotton cousin cradle crane crayon creek cricket crown cup curtain
  dancer desert desk diamond dinner dolphin donkey door dragon drawer dress drum
  eagle earth echo elbow engine envelope evening farm farmer feather fence
  ferry fiddle field finger flag flame flower flute forest fork fountain fox
  friend frog garden gate ghost giraffe glove goat goose grape guitar hammer
  harbor harp hat hawk helmet hill honey horse hotel house island jacket jar
  jewel judge jungle kettle key kitchen kite kitten ladder lake lamp lantern
  leaf lemon letter library lion lizard lobster magnet mango map marble market
  meadow medal melon mirror monkey moon morning mountain mouse museum nest
  notebook ocean office onion orchard otter owl oyster paddle page painter
  palace panda paper parade parrot pasture peach peanut pencil pepper piano
  picture pigeon pillow pilot planet plate pocket poem pond potato prince puzzle
  rabbit radio rain ribbon river road robin rocket roof rope rose
  """.split()
)
