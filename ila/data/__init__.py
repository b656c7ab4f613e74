"""From a file of rows to token ids with the loss on the answers.

>>> from ila.data import Collator, encode, load_rows, pad_token_id
"""

from ila.data.encoding import Collator as Collator
from ila.data.encoding import DataSummary as DataSummary
from ila.data.encoding import encode as encode
from ila.data.encoding import pad_token_id as pad_token_id
from ila.data.encoding import token_count as token_count
from ila.data.rows import load_rows as load_rows
