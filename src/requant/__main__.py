"""`python -m requant`, as `requant`."""

import sys

from requant.main import main

sys.exit(main())
