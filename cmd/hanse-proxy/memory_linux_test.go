package main

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

const smaps = `00400000-01dcf000 r-xp 00000000 fe:01 123                                /usr/bin/hanse-proxy
Rss:               11000 kB
Private_Dirty:         8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
01dcf000-03de0000 r--p 019cf000 fe:01 123                                /usr/bin/hanse-proxy
Private_Dirty:         0 kB
Anonymous:             0 kB
03de0000-03e00000 r--p 019cf000 fe:01 123                                /usr/bin/hanse-proxy
Private_Dirty:         4 kB
Anonymous:             4 kB
03e00000-03f00000 rw-p 019cf000 fe:01 123                                /usr/bin/hanse-proxy
Private_Dirty:         0 kB
Anonymous:             0 kB
c000000000-c000800000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7ffff7fc9000-7ffff7fcb000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
7ffff7fd0000-7ffff7fd1000 r--p 00000000 fe:01 123                        /usr/bin/hanse-proxy
`

func TestOnlyCleanPagesOfTheProgram(t *testing.T) {
	spans, err := cleanSpans(strings.NewReader(smaps), "/usr/bin/hanse-proxy")
	if want := []span{{0x400000, 0x1dcf000}, {0x1dcf000, 0x3de0000}}; err != nil || !reflect.DeepEqual(spans, want) {
		t.Errorf("%x, %v; want %x", spans, err, want)
	}
}

func TestTrimMakesThisProcessSmaller(t *testing.T) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	exe, _ := os.Readlink("/proc/self/exe")
	if spans, err := cleanSpans(f, exe); err != nil || len(spans) == 0 {
		t.Fatalf("%d mappings of %s, %v", len(spans), exe, err)
	}
	if err := trim(); err != nil {
		t.Fatal(err)
	}
}
