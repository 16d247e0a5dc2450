"""Instructions of a decoder's step, interpreted or compiled into one call of C++."""
