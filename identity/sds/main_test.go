package sds_test

import (
	"os"
	"runtime"
	"testing"
)

// TestMain runs the tests on one processor. Go 1.26's runtime crashes under -race when two goroutines of a synctest bubble start a timer
// of zero at the same moment, as bufconn does at each dial: both then use the bubble's one race context. The detector goes by
// happens-before, not by luck, and finds as much on one processor.
func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(1)
	os.Exit(m.Run())
}
