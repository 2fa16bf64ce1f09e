//go:build !linux && !darwin

package peercred

import "errors"

func of(int) (Caller, error) { return Caller{}, errors.ErrUnsupported }
