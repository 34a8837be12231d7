#!/usr/bin/env bash
. "$(dirname "$0")/../common/prepare.sh"

setting BPE 6000 "joint BPE merges" whole 1
TOKENIZE=(--normalize --lowercase)
TOKENIZE_TEST=("${TOKENIZE[@]}")

at=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw
file train.de.gz $at/train.de.gz - md5:81ff90b99829c0cd4b1b587d394afd39
file train.en.gz $at/train.en.gz - md5:0065d13af80720a55ca8153d126e6627
file val.de.gz $at/val.de.gz - md5:6e0e229eb049e3fc99a1ef02fb2d5f91
file val.en.gz $at/val.en.gz - md5:2b69aa9253948ac9f67e94917272dd40
file test_2016_flickr.de.gz $at/test_2016_flickr.de.gz - md5:efd67d314d98489b716b145475101932
file test_2016_flickr.en.gz $at/test_2016_flickr.en.gz - md5:ff2c0fcb4893a13bd73414306bc250ae

prepare "Multi30k German-English: 29,000 image captions (CC BY-NC-SA 4.0), lower-cased; test on test_2016_flickr." "$@"
