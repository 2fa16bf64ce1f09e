package sidecar

import (
	"context"
	"testing"
	"time"
)

// TestCancelEndsConnecting: a transfer is the context of its own connecting, and is not used again once somebody may look at it.
func TestCancelEndsConnecting(t *testing.T) {
	tr := &transfer{}
	ctx, cancel := context.WithTimeout(tr, time.Minute)
	defer cancel()
	if ctx.Err() != nil || tr.Err() != nil {
		t.Fatal("over before it began")
	}
	tr.cancel(errCallerGone)
	select {
	case <-ctx.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("connecting goes on without a caller")
	}
	if !tr.spoilt || tr.Err() != context.Canceled {
		t.Error(tr.spoilt, tr.Err())
	}
	late := &transfer{}
	late.cancel(errRequestTimeout)
	select {
	case <-late.Done():
	default:
		t.Error("who looks later is not told")
	}
}
