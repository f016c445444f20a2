"""What a run directory tells, as one page: an HTML file that needs nothing beside it, for a browser or a phone.

runs.py      a run directory -> plain data; what cannot be read is said, never raised
curves.py    lines of the log -> curves, thinned to what a screen can show; trivial baselines and skill
ticks.py     round numbers for axes, short numbers for people
charts.py    curves -> inline SVG with hover values and a table
panels.py    which charts and tables there are, in which order
words.py     what every number means, in a sentence
pictures.py  what evaluations drew, recompressed within a budget
facts.py     summary, events, difference of recipes, how to reproduce
page.py      all of it -> one HTML file
writing.py   the page of a run that goes on, written at its evaluations
server.py    the page of a run that goes on, in a browser
"""
