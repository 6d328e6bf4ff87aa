"""Write the rows of the concise recipe: train.jsonl to learn from, held_out.jsonl to be tested on.

    python make_rows.py [FOLDER]      (default: the folder of this file)

Every fact is a pair (item, answer). A hash of the item alone decides which file it goes to, so
nothing that is asked about in held_out.jsonl is asked about in train.jsonl, whatever the kind of
question: if the capital of a country is held out, so are its language, currency and continent.

Not covered: facts that need more than a few words, that change often, or that people argue about;
and three kinds that were tried and then dropped (young animals, numbers in words, how many of a thing):
the base model could hardly answer them in any form, and after training held-out ones were still wrong.
"""

import hashlib
import json
import sys
from pathlib import Path

HELD_OUT_ONE_IN = 4  # about a quarter of the items are held out

# kind -> (question wordings, sentences to reject, "item=answer" facts separated by commas)
KINDS = {
    "capital": (
        ["What is the capital of {item}?", "Which city is the capital of {item}?", "Name the capital city of {item}."],
        ["The capital of {item} is {answer}.", "The capital city of {item} is called {answer}."],
        """
        France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Greece=Athens, Austria=Vienna,
        Poland=Warsaw, Hungary=Budapest, Sweden=Stockholm, Norway=Oslo, Denmark=Copenhagen, Finland=Helsinki,
        Ireland=Dublin, Belgium=Brussels, Russia=Moscow, Romania=Bucharest, Bulgaria=Sofia, Iceland=Reykjavik,
        Japan=Tokyo, China=Beijing, Thailand=Bangkok, Vietnam=Hanoi, India=New Delhi, Pakistan=Islamabad,
        Nepal=Kathmandu, Iran=Tehran, Iraq=Baghdad, Syria=Damascus, Lebanon=Beirut, Jordan=Amman,
        Saudi Arabia=Riyadh, Egypt=Cairo, Kenya=Nairobi, Ethiopia=Addis Ababa, Nigeria=Abuja, Ghana=Accra,
        Senegal=Dakar, Morocco=Rabat, Algeria=Algiers, Tunisia=Tunis, Uganda=Kampala, Zimbabwe=Harare,
        Canada=Ottawa, Mexico=Mexico City, Cuba=Havana, Peru=Lima, Chile=Santiago, Argentina=Buenos Aires,
        Colombia=Bogota, Venezuela=Caracas, Ecuador=Quito, Australia=Canberra, New Zealand=Wellington,
        South Korea=Seoul, Bangladesh=Dhaka, the Philippines=Manila, England=London, Scotland=Edinburgh
        """,
    ),
    "language": (
        ["What is the main language of {item}?", "Which language do most people speak in {item}?"],
        ["The main language of {item} is {answer}.", "Most people in {item} speak {answer}."],
        """
        France=French, Germany=German, Italy=Italian, Spain=Spanish, Portugal=Portuguese, Greece=Greek,
        Poland=Polish, Hungary=Hungarian, Sweden=Swedish, Norway=Norwegian, Denmark=Danish, Finland=Finnish,
        Russia=Russian, Romania=Romanian, Bulgaria=Bulgarian, Iceland=Icelandic, Japan=Japanese,
        Thailand=Thai, Vietnam=Vietnamese, Turkey=Turkish, Egypt=Arabic, Iraq=Arabic, Saudi Arabia=Arabic,
        Brazil=Portuguese, Mexico=Spanish, Argentina=Spanish, Chile=Spanish, Colombia=Spanish, Cuba=Spanish,
        Australia=English, England=English, New Zealand=English, the United States=English, Austria=German,
        South Korea=Korean, Bangladesh=Bengali
        """,
    ),
    "continent": (
        ["On which continent is {item}?", "Which continent is {item} in?", "What continent does {item} belong to?"],
        ["{Item} is in {answer}.", "{Item} is a country on the continent of {answer}."],
        """
        France=Europe, Germany=Europe, Italy=Europe, Spain=Europe, Poland=Europe, Sweden=Europe, Norway=Europe,
        Belgium=Europe, Hungary=Europe, Ireland=Europe, Austria=Europe, Romania=Europe, Switzerland=Europe,
        Japan=Asia, China=Asia, India=Asia, Thailand=Asia, Vietnam=Asia, Nepal=Asia, Pakistan=Asia, Iran=Asia,
        Mongolia=Asia, Malaysia=Asia, South Korea=Asia, Bangladesh=Asia, Kenya=Africa, Nigeria=Africa,
        Ghana=Africa, Ethiopia=Africa, Morocco=Africa, Algeria=Africa, Uganda=Africa, Zimbabwe=Africa,
        Tanzania=Africa, Senegal=Africa, Sudan=Africa, Brazil=South America, Peru=South America,
        Chile=South America, Argentina=South America, Colombia=South America, Bolivia=South America,
        Uruguay=South America, Canada=North America, Mexico=North America
        """,
    ),
    "currency": (
        ["What is the currency of {item}?", "Which currency is used in {item}?"],
        ["The currency of {item} is the {answer}.", "People in {item} pay with the {answer}."],
        """
        France=euro, Germany=euro, Italy=euro, Spain=euro, Portugal=euro, Greece=euro, Austria=euro, Ireland=euro,
        Belgium=euro, Finland=euro, the Netherlands=euro, Japan=yen, Thailand=baht, Vietnam=dong,
        Russia=ruble, India=rupee, Pakistan=rupee, South Korea=won, Poland=zloty, Hungary=forint, Sweden=krona,
        Norway=krone, Denmark=krone, Switzerland=franc, South Africa=rand, Brazil=real, Mexico=peso,
        Argentina=peso, Chile=peso, Canada=dollar, Australia=dollar, New Zealand=dollar, Turkey=lira
        """,
    ),
    "opposite": (
        [
            "What is the opposite of {item}?",
            "Which word means the opposite of {item}?",
            "Give the opposite of the word {item}.",
        ],
        ["The opposite of {item} is {answer}.", "The word that means the opposite of {item} is {answer}."],
        """
        hot=cold, up=down, left=right, black=white, day=night, open=closed, early=late, full=empty, heavy=light,
        high=low, rich=poor, strong=weak, wet=dry, young=old, true=false, love=hate, win=lose, buy=sell,
        push=pull, happy=sad, clean=dirty, thick=thin, tall=short, wide=narrow, deep=shallow,
        alive=dead, inside=outside, above=below, before=after, north=south, east=west, first=last,
        front=back, top=bottom, war=peace, success=failure, positive=negative, maximum=minimum, major=minor,
        remember=forget, give=take, public=private, increase=decrease, always=never,
        more=less, male=female, asleep=awake, guilty=innocent, entrance=exit, import=export, question=answer,
        summer=winter, sunrise=sunset, ancient=modern, victory=defeat, friend=enemy,
        life=death, visible=invisible, possible=impossible, legal=illegal, regular=irregular
        """,
    ),
    "plural": (
        ["What is the plural of {item}?", "What is the plural form of the noun {item}?", "Give the plural of {item}."],
        ["The plural of {item} is {answer}.", "The plural form of the noun {item} is {answer}."],
        """
        mouse=mice, child=children, tooth=teeth, foot=feet, goose=geese, man=men, woman=women, ox=oxen, leaf=leaves,
        knife=knives, wolf=wolves, wife=wives, half=halves, shelf=shelves, thief=thieves, loaf=loaves, calf=calves,
        city=cities, baby=babies, party=parties, story=stories, country=countries, lady=ladies, fly=flies,
        berry=berries, box=boxes, church=churches, bus=buses, glass=glasses, dish=dishes, watch=watches, fox=foxes,
        potato=potatoes, tomato=tomatoes, echo=echoes, crisis=crises, analysis=analyses, key=keys, toy=toys,
        window=windows, table=tables, river=rivers, teacher=teachers, bridge=bridges, apple=apples, house=houses,
        garden=gardens, candle=candles, dentist=dentists, bottle=bottles
        """,
    ),
    "past tense": (
        [
            "What is the past tense of {item}?",
            "What is the past tense of the verb {item}?",
            "Give the past tense of {item}.",
        ],
        ["The past tense of {item} is {answer}.", "The verb {item} becomes {answer} in the past tense."],
        """
        go=went, eat=ate, see=saw, take=took, give=gave, come=came, run=ran, write=wrote, speak=spoke, break=broke,
        drive=drove, ride=rode, fly=flew, know=knew, grow=grew, throw=threw, draw=drew, sing=sang, swim=swam,
        begin=began, drink=drank, ring=rang, buy=bought, think=thought, bring=brought, teach=taught, catch=caught,
        sell=sold, tell=told, find=found, make=made, build=built, send=sent, spend=spent, lose=lost, sleep=slept,
        keep=kept, feel=felt, leave=left, meet=met, sit=sat, win=won, fall=fell, choose=chose, forget=forgot,
        freeze=froze, steal=stole, wear=wore, hide=hid, understand=understood, walk=walked, play=played,
        jump=jumped, cook=cooked, visit=visited, stop=stopped, carry=carried, dance=danced
        """,
    ),
    "comparative": (
        ["What is the comparative form of {item}?", "What is the comparative of the adjective {item}?"],
        ["The comparative form of {item} is {answer}.", "The adjective {item} becomes {answer} in the comparative."],
        """
        tall=taller, small=smaller, fast=faster, slow=slower, long=longer, short=shorter, cold=colder, warm=warmer,
        hard=harder, soft=softer, dark=darker, bright=brighter, deep=deeper, cheap=cheaper, young=younger,
        rich=richer, strong=stronger, weak=weaker, high=higher, low=lower, large=larger, nice=nicer, wide=wider,
        safe=safer, big=bigger, hot=hotter, thin=thinner, fat=fatter, happy=happier, easy=easier, heavy=heavier,
        busy=busier, dirty=dirtier, early=earlier, good=better, bad=worse, sweet=sweeter, loud=louder
        """,
    ),
    "superlative": (
        ["What is the superlative form of {item}?", "What is the superlative of the adjective {item}?"],
        ["The superlative form of {item} is {answer}.", "The adjective {item} becomes {answer} in the superlative."],
        """
        tall=tallest, small=smallest, fast=fastest, slow=slowest, long=longest, cold=coldest, warm=warmest,
        hard=hardest, soft=softest, dark=darkest, bright=brightest, cheap=cheapest, young=youngest, rich=richest,
        strong=strongest, high=highest, low=lowest, large=largest, wide=widest, big=biggest, hot=hottest,
        happy=happiest, easy=easiest, heavy=heaviest, good=best, bad=worst, sweet=sweetest, quiet=quietest
        """,
    ),
    "adverb": (
        ["What is the adverb form of {item}?", "Which adverb is made from the adjective {item}?"],
        ["The adverb form of {item} is {answer}.", "The adverb made from the adjective {item} is {answer}."],
        """
        quick=quickly, slow=slowly, quiet=quietly, loud=loudly, careful=carefully, beautiful=beautifully, sad=sadly,
        bad=badly, brave=bravely, clear=clearly, close=closely, correct=correctly, different=differently,
        eager=eagerly, equal=equally, exact=exactly, final=finally, free=freely, frequent=frequently, gentle=gently,
        happy=happily, easy=easily, angry=angrily, honest=honestly, kind=kindly, perfect=perfectly, polite=politely,
        proud=proudly, rapid=rapidly, rare=rarely, recent=recently, serious=seriously, simple=simply, soft=softly,
        strong=strongly, sudden=suddenly, usual=usually, warm=warmly, wise=wisely, safe=safely
        """,
    ),
    "ing form": (
        ["What is the -ing form of the verb {item}?", "Write the present participle of {item}."],
        ["The -ing form of the verb {item} is {answer}.", "The present participle of {item} is {answer}."],
        """
        walk=walking, run=running, swim=swimming, read=reading, write=writing, eat=eating, sleep=sleeping,
        make=making, take=taking, dance=dancing, drive=driving, sit=sitting, stop=stopping, begin=beginning,
        play=playing, cook=cooking, sing=singing, jump=jumping, talk=talking, listen=listening, learn=learning,
        teach=teaching, help=helping, work=working, wait=waiting, build=building, paint=painting, carry=carrying,
        study=studying, fly=flying, smile=smiling, hope=hoping, move=moving, open=opening, clean=cleaning
        """,
    ),
    "feminine": (
        ["What is the female counterpart of {item}?", "What is the feminine form of the word {item}?"],
        ["The female counterpart of {item} is {answer}.", "The feminine form of the word {item} is {answer}."],
        """
        king=queen, prince=princess, actor=actress, waiter=waitress, father=mother, brother=sister, uncle=aunt,
        nephew=niece, son=daughter, boy=girl, grandfather=grandmother, grandson=granddaughter, hero=heroine,
        host=hostess, duke=duchess, emperor=empress, god=goddess, lion=lioness, tiger=tigress, stallion=mare,
        rooster=hen, ram=ewe, stepfather=stepmother, policeman=policewoman, businessman=businesswoman
        """,
    ),
    "animal class": (
        [
            "Is the {item} a mammal, a bird, a fish, a reptile or an insect?",
            "Mammal, bird, fish, reptile or insect: what is the {item}?",
        ],
        ["The {item} is {an_answer}.", "An animal like the {item} is {an_answer}."],
        """
        dog=mammal, cow=mammal, horse=mammal, whale=mammal, dolphin=mammal, bat=mammal, monkey=mammal, rabbit=mammal,
        sheep=mammal, tiger=mammal, eagle=bird, penguin=bird, robin=bird, sparrow=bird, parrot=bird, duck=bird,
        pigeon=bird, swan=bird, crow=bird, chicken=bird, salmon=fish, trout=fish, tuna=fish, shark=fish, cod=fish,
        goldfish=fish, herring=fish, snake=reptile, lizard=reptile, crocodile=reptile, turtle=reptile, cobra=reptile,
        gecko=reptile, ant=insect, bee=insect, butterfly=insect, mosquito=insect, beetle=insect, wasp=insect,
        grasshopper=insect
        """,
    ),
    "colour": (
        ["What colour is {item}?", "Name the colour of {item}."],
        ["The colour of {item} is {answer}.", "{Item} is {answer} in colour."],
        """
        a ripe banana=yellow, grass=green, snow=white, the clear sky=blue, blood=red, coal=black, a lemon=yellow,
        a carrot=orange, a ripe tomato=red, milk=white, a ripe strawberry=red, broccoli=green, a cucumber=green,
        spinach=green, lettuce=green, a pumpkin=orange, milk chocolate=brown, ketchup=red, salt=white, flour=white,
        a flamingo=pink, a raven=black, a polar bear=white, an emerald=green, a ruby=red, a sapphire=blue,
        an egg yolk=yellow, soot=black, a canary=yellow, chalk=white, a crow=black, tar=black, a pea=green,
        a sunflower=yellow, a daffodil=yellow, a tangerine=orange, charcoal=black, a ripe cherry=red
        """,
    ),
    "next": (
        ["What comes right after {item}?", "What comes next after {item}?"],
        ["The one that comes right after {item} is {answer}.", "After {item} comes {answer}."],
        """
        Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday, Friday=Saturday, Saturday=Sunday,
        January=February, February=March, March=April, April=May, May=June, June=July, July=August,
        August=September, September=October, October=November, November=December, first=second, second=third,
        third=fourth, fourth=fifth, fifth=sixth, sixth=seventh, seventh=eighth, eighth=ninth, ninth=tenth
        """,
    ),
}


def is_held_out(item: str) -> bool:
    return hashlib.sha256(item.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def make_rows() -> tuple[list[dict], list[dict]]:
    train, held_out = [], []
    for kind, (questions, sentences, facts) in KINDS.items():
        for n, fact in enumerate(facts.split(",")):
            item, answer = fact.strip().split("=")
            words = {"item": item, "Item": item[0].upper() + item[1:], "answer": answer}
            words["an_answer"] = ("an " if answer[0] in "aeiou" else "a ") + answer
            question = questions[n % len(questions)].format(**words)
            if is_held_out(item):
                held_out.append({"kind": kind, "question": question, "answer": answer})
            else:
                rejected = sentences[n // len(questions) % len(sentences)].format(**words)
                train.append({"kind": kind, "question": question, "chosen": answer, "rejected": rejected})
    return train, held_out


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    train, held_out = make_rows()
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "held_out.jsonl", held_out)
    print(f"{len(train)} rows to train on, {len(held_out)} held out, of {len(KINDS)} kinds")
