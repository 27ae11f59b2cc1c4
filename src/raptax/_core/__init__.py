"""What every part of the package uses: types, errors, pytrees, derivatives."""
