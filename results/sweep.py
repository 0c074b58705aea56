"""Print how well workers mix, the spectral gap, for several N and C: python -m results.sweep"""

from masks import Unit, assign, spectral_gap
from scripts.alignment import cyclic
from support.launch import at_least, make_parser


def main(argv=None):
    flags = ("--count", at_least(1), 16, "units"), ("--seed", at_least(0), 0, "of the masks")
    args = make_parser(__doc__, flags).parse_args(argv)
    units = [Unit("unit", "unit", cost=1)] * args.count
    print(f"{'workers':<10}{'assign':<10}", *(f"{f'C = {eighths / 8:g}':>9}" for eighths in range(1, 9)))
    for workers in (2, 4, 8, 16, 32):
        for name, way in (("random", assign), ("cyclic", cyclic)):
            line = f"{workers:<10}{name:<10}"
            for eighths in range(1, 9):
                holders = (eighths * workers + 4) // 8  # as holders_per_unit, but it can be 0
                mask = None if args.count * holders < workers else way(units, workers, holders, args.seed)
                line += f"{'-':>10}" if mask is None else f"{spectral_gap(mask):>10.3f}"
            print(line)


if __name__ == "__main__":
    main()
