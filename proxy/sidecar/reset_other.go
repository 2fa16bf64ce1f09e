//go:build !unix

package sidecar

func dropUnsent(uintptr) {}
