#!/bin/sh
# A command line is a function too: standard input is the call, standard output is the answer.
exec tr a-z A-Z
